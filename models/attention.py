"""Scaled dot-product attention (Vaswani et al., 2017, eq. 1): one function with several backends, and two layers.

Self-attention computes q, k and v in one matrix product, cross-attention k and v of the text, which depend on neither
the noisy latent nor the timestep. An `Attention` object belongs to one network; its layers share its backend and hook.
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from errors import InputError

BACKENDS = ("auto", "fused", "sdpa", "reference")
WIDEST = 160  # channels per head that the fused kernels take

Hook = Callable[[Tensor, Tensor, Tensor, bool], Tensor | None]


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
    """softmax(q kᵀ / √d) v.

    q (B, heads, N, d), k and v (B, heads, M, d) -> (B, heads, N, d). Backends:
      auto       sdpa; on a CPU where gradients are wanted, plain products, whose backward pass is faster there
      sdpa       PyTorch's fused kernels
      fused      this project's Triton kernels, for CUDA; heads wider than `WIDEST` go to sdpa
      reference  plain products, all in float32 (of float64 in float64)
    Raises InputError as `check_backend` does."""
    learning = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if backend == "auto" and q.device.type == "cpu" and learning:
        weights = ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(dim=-1, dtype=torch.float32)
        return weights.to(v.dtype) @ v
    if backend in ("auto", "sdpa"):
        return F.scaled_dot_product_attention(q, k, v)
    if backend == "reference":
        maps = attention_map(q, k)
        return (maps @ v.to(maps.dtype)).to(q.dtype)
    if not torch.compiler.is_compiling():
        check_backend(backend, q.device)
    if q.shape[-1] > WIDEST:
        return F.scaled_dot_product_attention(q, k, v)
    from models.fused_attention import fused_attention  # here, because importing Triton takes a while

    return fused_attention(q, k, v)


def attention_map(q: Tensor, k: Tensor) -> Tensor:
    """The attention weights: q (B, heads, N, d), k (B, heads, M, d) -> (B, heads, N, M), float32, or float64 as q."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    return (q.to(dtype) @ k.to(dtype).mT * q.shape[-1] ** -0.5).softmax(dim=-1)


@functools.cache
def why_not_fused(device: torch.device) -> str | None:
    """Why the fused kernels cannot run on `device`, and an alternative; None if they can."""
    needs = None
    if not find_spec("triton"):
        needs = "Triton, which is not installed"
    elif device.type != "cuda":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # for tests
        needs = None if interpreted else f"a CUDA device, not {device.type}"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        needs = f"compute capability 8.0 or more, which {torch.cuda.get_device_name(device)} lacks"
    return needs and f"fused attention needs {needs}; use attention=auto"


def check_backend(name: str, device: torch.device) -> None:
    """Raise InputError for an unknown name, and for fused where the device cannot run it."""
    if name not in BACKENDS:
        raise InputError(f"attention={name} is unknown: {', '.join(BACKENDS)}")
    if name == "fused" and (reason := why_not_fused(device)):
        raise InputError(reason)


class Attention:
    """The attention of one network: its layers call it, its owner sets `backend` (see `attention`) and hooks."""

    def __init__(self):
        self.backend = "auto"
        self.hook: Hook | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cross: bool = False) -> Tensor:
        """`attention(q, k, v)`, or the hook's result; `cross` says whether k and v are the text's."""
        out = None if self.hook is None else self.hook(q, k, v, cross)
        return attention(q, k, v, self.backend) if out is None else out

    @contextmanager
    def hooked(self, hook: Hook) -> Iterator[None]:
        """Inside, every layer asks `hook(q, k, v, cross)` for its result first; None declines. `attention_map` gives a
        hook the weights. A compiled network runs uncompiled here, or it would be compiled again for each hook."""
        before, self.hook = self.hook, hook
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self.hook = before


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself, (B, N, dim) -> (B, N, dim)."""

    def __init__(self, dim: int, heads: int, head_dim: int, attention: Attention):
        super().__init__()
        self.heads, self.attention = heads, attention
        self.to_qkv = nn.Linear(dim, 3 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.to_qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        return self.to_out(rearrange(self.attention(q, k, v), "b h n d -> b n (h d)"))


class CrossAttention(nn.Module):
    """Multi-head attention of a sequence to the text, (B, N, dim) -> (B, N, dim), by keys and values from `project`."""

    def __init__(self, dim: int, context_dim: int, heads: int, head_dim: int, attention: Attention):
        super().__init__()
        self.heads, self.attention = heads, attention
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(context_dim, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim)

    def project(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Text states (B, L, C) -> keys and values, each (B, heads, L, d)."""
        k, v = rearrange(self.to_kv(context), "b l (two h d) -> two b h l d", two=2, h=self.heads)
        return k, v

    def forward(self, x: Tensor, kv: tuple[Tensor, Tensor]) -> Tensor:
        q = rearrange(self.to_q(x), "b n (h d) -> b h n d", h=self.heads)
        return self.to_out(rearrange(self.attention(q, *kv, cross=True), "b h n d -> b n (h d)"))
