"""Attention: one function with several backends, and the two layers that call it.

Scaled dot-product attention as in Vaswani et al. (2017), eq. 1. Self-attention computes q, k and v in one matrix
product; cross-attention computes k and v of the text in one, and can be handed them ready, because they depend on
neither the noisy latent nor the timestep.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from errors import InputError
from models.layers import Linear, constant, emulated

BACKENDS = ("auto", "fused", "sdpa", "reference")
WIDEST = 160  # channels per head that the fused kernels take
_backend = "auto"


def set_backend(name: str) -> None:
    """Choose the backend of every later `attention` call that names none. Raises InputError for an unknown name."""
    global _backend
    if name not in BACKENDS:
        raise InputError(f"unknown attention backend {name!r}: choose one of {', '.join(BACKENDS)}")
    _backend = name


@contextmanager
def use_backend(name: str):
    """`set_backend` for the length of a with-block."""
    before = _backend
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str | None = None) -> Tensor:
    """softmax(q kᵀ / √d) v.

    q (B, heads, N, d), k and v (B, heads, M, d) -> (B, heads, N, d). `backend`: "fused" (this project's Triton kernels,
    for CUDA; heads wider than they take, such as the autoencoder's one, go to "sdpa"), "sdpa" (PyTorch's fused
    kernels), "reference" (plain products, softmax in float32), "auto" (the same as "sdpa", as long as no measurement
    shows "fused" to be faster), or None for the one chosen with `set_backend`. Raises InputError for "fused" where it
    cannot run, and for an unknown name.
    """
    name = backend or _backend
    if name == "reference":
        return (attention_map(q, k) @ v.float()).to(q.dtype)
    if name == "fused" and (reason := why_not_fused(q.device)):
        raise InputError(reason)
    if name == "fused" and q.shape[-1] <= WIDEST:
        from models.fused_attention import fused_attention  # here, because importing Triton takes a while

        return fused_attention(q, k, v)
    if name in ("auto", "fused", "sdpa"):
        if emulated(q.device, q.dtype):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v)
    raise InputError(f"unknown attention backend {name!r}: choose one of {', '.join(BACKENDS)}")


@constant
def why_not_fused(device: torch.device) -> str | None:
    """Why the fused kernels cannot run on `device`, and what would do; None if they can."""
    return _why_not_fused(device)


@functools.cache
def _why_not_fused(device: torch.device) -> str | None:
    if not find_spec("triton"):
        return "fused attention needs Triton, which is not installed; use attention=auto or attention=sdpa"
    if device.type != "cuda":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        advice = "use attention=auto or attention=sdpa (TRITON_INTERPRET=1 runs it there, but slowly: for tests)"
        return None if interpreted else f"fused attention needs a CUDA device, not {device.type}; {advice}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        return f"fused attention needs a GPU of compute capability 8.0 or more, which {name} is not; use attention=sdpa"
    return None


def attention_map(q: Tensor, k: Tensor) -> Tensor:
    """The attention weights themselves, float32: q (B, heads, N, d), k (B, heads, M, d) -> (B, heads, N, M)."""
    return (q.float() @ k.float().mT * q.shape[-1] ** -0.5).softmax(dim=-1)


Hook = Callable[[Tensor, Tensor, Tensor, bool], "Tensor | None"]
_hook: Hook | None = None


@contextmanager
def hooked(hook: Hook):
    """Inside, every attention layer of the UNet asks `hook(q, k, v, cross)` for its result first; `cross` says whether
    it attends to the text. None leaves it to `attention`. A hook that wants the weights has them by `attention_map`.
    A compiled network runs as it is written, rather than being compiled anew for each hook."""
    global _hook
    before, _hook = _hook, hook
    compiling = "torch._dynamo" in sys.modules  # which else would be imported here, for seconds
    try:
        with torch.compiler.set_stance("force_eager") if compiling else nullcontext():
            yield
    finally:
        _hook = before


def attend(q: Tensor, k: Tensor, v: Tensor, cross: bool) -> Tensor:
    """What the layers call: the hook's result where there is one, else `attention`'s."""
    out = None if _hook is None else _hook(q, k, v, cross)
    return attention(q, k, v) if out is None else out


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself, (B, N, dim) -> (B, N, dim)."""

    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.to_qkv = Linear(dim, 3 * heads * head_dim, bias=False)
        self.to_out = Linear(heads * head_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.to_qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        return self.to_out(rearrange(attend(q, k, v, cross=False), "b h n d -> b n (h d)"))


class CrossAttention(nn.Module):
    """Multi-head attention of a sequence to the text, (B, N, dim) -> (B, N, dim).

    `project(context)` gives the keys and values, which `forward` takes; so a sampler computes them once per prompt.
    """

    def __init__(self, dim: int, context_dim: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.index = 0  # position among the network's cross-attention layers, set by the network
        self.to_q = Linear(dim, heads * head_dim, bias=False)
        self.to_kv = Linear(context_dim, 2 * heads * head_dim, bias=False)
        self.to_out = Linear(heads * head_dim, dim)

    def project(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Text states (B, L, C) -> keys and values, each (B, heads, L, d)."""
        k, v = rearrange(self.to_kv(context), "b l (two h d) -> two b h l d", two=2, h=self.heads)
        return k, v

    def forward(self, x: Tensor, kv: tuple[Tensor, Tensor]) -> Tensor:
        q = rearrange(self.to_q(x), "b n (h d) -> b h n d", h=self.heads)
        return self.to_out(rearrange(attend(q, *kv, cross=True), "b h n d -> b n (h d)"))
