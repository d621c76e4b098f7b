"""Low-rank adaptation (Hu et al., 2021, arXiv 2106.09685, eq. 3) of the UNet's attention: W' = W + B A, W
frozen.

While tuning, the sum stands in for each weight through PyTorch's own parametrisation; for sampling it is
formed once, so that an adapted network costs no more than the plain one.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class LowRank(nn.Module):
    """W (out, in) -> W + B A. A (rank, in) starts at random and B (out, rank) at zero: nothing changes at
    first."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator):
        super().__init__()
        n_out, n_in = weight.shape
        self.a = nn.Parameter((torch.randn(rank, n_in, generator=generator) * n_in**-0.5).to(weight))
        self.b = nn.Parameter(weight.new_zeros(n_out, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def in_attention(names: Iterable[str]) -> list[str]:
    """Those of the names that lie in a self-attention (attn1) or a cross-attention (attn2)."""
    return [name for name in names if {"attn1", "attn2"} & set(name.split("."))]


@contextmanager
def adapters(unet: nn.Module, rank: int, generator: torch.Generator) -> Iterator[dict[str, nn.Parameter]]:
    """Inside, every linear layer of the attentions carries a `LowRank`, and their matrices are handed out, by
    "<layer>.a" (rank, in) and "<layer>.b" (out, rank); afterwards the layers are as before. The rank is
    capped by a layer's smaller side, beyond which it would add nothing."""
    linear = {name: layer for name, layer in unet.named_modules() if isinstance(layer, nn.Linear)}
    layers = {name: linear[name] for name in in_attention(linear)}
    matrices = {}
    try:
        for name, layer in layers.items():
            low_rank = LowRank(layer.weight, min(rank, *layer.weight.shape), generator)
            parametrize.register_parametrization(layer, "weight", low_rank)
            matrices |= {f"{name}.a": low_rank.a, f"{name}.b": low_rank.b}
        yield matrices
    finally:
        for layer in layers.values():
            if parametrize.is_parametrized(layer):
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


def merged(unet: nn.Module, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sums W + B A of all layers in `matrices`, by parameter name."""
    weights = {}
    for name in [key.removesuffix(".a") for key in matrices if key.endswith(".a")]:
        weight = unet.get_parameter(f"{name}.weight").detach()
        a, b = matrices[f"{name}.a"].to(weight), matrices[f"{name}.b"].to(weight)
        weights[f"{name}.weight"] = weight + b @ a
    return weights
