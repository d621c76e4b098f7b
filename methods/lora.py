"""Low-rank adaptation (Hu et al., 2021, arXiv 2106.09685, eq. 3) of a network's attention: h = W x + B A x, W frozen.

The products stay apart, in tuning and in sampling: the sum W + B A in half precision doubles a small update's error.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def in_attention(names: Iterable[str]) -> list[str]:
    """Those of the names that lie in an attention: a UNet's attn1 and attn2, an MMDiT's attn and attn2."""
    return [name for name in names if {"attn", "attn1", "attn2"} & set(name.split("."))]


@contextmanager
def adapters(network: nn.Module, rank: int, generator: torch.Generator) -> Iterator[dict[str, nn.Parameter]]:
    """Inside, every linear layer of the attentions carries an adapter; afterwards the layers are as before.

    Yields the matrices, in float32: "<layer>.a" (rank, in), random, and "<layer>.b" (out, rank), zero, so that nothing
    changes at first. The rank is capped by a layer's smaller side, beyond which it would add nothing.
    """
    linear = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    matrices = {}
    with ExitStack() as hooks:
        hooks.enter_context(torch.compiler.set_stance("force_eager"))  # a compiled network does not see new hooks
        for name in in_attention(linear):
            n_out, n_in = linear[name].weight.shape
            r, device = min(rank, n_in, n_out), linear[name].weight.device
            a = nn.Parameter((torch.randn(r, n_in, generator=generator) * n_in**-0.5).to(device))
            b = nn.Parameter(torch.zeros(n_out, r, device=device))
            hooks.enter_context(linear[name].register_forward_hook(partial(adapted, a, b)))
            matrices |= {f"{name}.a": a, f"{name}.b": b}
        yield matrices


def adapted(a: Tensor, b: Tensor, layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """The forward hook: `output` + B A x, the products in the dtype of x."""
    (x,) = inputs
    return output + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
