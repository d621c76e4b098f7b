"""Building blocks shared by the UNet and the autoencoder (Rombach et al., 2022; He et al., 2016)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.layers import Conv2d, Linear


def zero_init(module: nn.Module) -> nn.Module:
    """Set all parameters of a last layer to zero, so that its block starts out as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=eps)


def bounds(rows: int, slices: int) -> Iterator[tuple[int, int]]:
    """First row and end of each of `slices` strips, or of as many as there are rows."""
    slices = min(slices, rows)
    return pairwise(rows * i // slices for i in range(slices + 1))


def conv_in_strips(
    conv: Conv2d,
    x: Tensor,
    slices: int,
    before: Callable[[Tensor], Tensor] = nn.Identity(),  # what comes before the convolution, row by row
    padding: tuple[int, int, int, int] = (1, 1, 1, 1),  # left, right, top, bottom
    scale: int = 1,  # how many rows `before` makes of one
) -> Tensor:
    """conv(pad(before(x))) for a 3x3 convolution, computed in `slices` horizontal strips of the output, so that only x
    (B, C, H, W) and the output exist whole. Where gradients are asked for, a strip is computed again for them."""
    stride, (left, right, top, bottom), height = conv.stride[0], padding, scale * x.shape[2]

    def part(x: Tensor, a: int, b: int) -> Tensor:
        first, end = stride * a - top, stride * (b - 1) + 3 - top  # the rows it sees, some beyond the map
        low, high = max(first, 0), min(end, height)
        y = before(x[:, :, low // scale : -(-high // scale)]).narrow(2, low % scale, high - low)
        return F.conv2d(F.pad(y, (left, right, low - first, end - high)), conv.weight, conv.bias, stride)

    rows = (height + top + bottom - 3) // stride + 1
    out = None
    for a, b in bounds(rows, slices):
        strip = checkpoint(part, x, a, b, use_reentrant=False, preserve_rng_state=False)
        if out is None:
            out = strip.new_empty(*strip.shape[:2], rows, strip.shape[3])
        out[:, :, a:b] = strip
    return out


def affine_of(norm: nn.GroupNorm, x: Tensor, slices: int) -> tuple[Tensor, Tensor]:
    """Scale and shift, each (B, C, 1, 1) in float32, with which norm(x) = scale x + shift; from the means and variances
    of `slices` horizontal strips of x (Chan et al., 1979)."""

    def moments(strip: Tensor) -> tuple[Tensor, Tensor]:
        variance, mean = torch.var_mean(strip.float().unflatten(1, (norm.num_groups, -1)), dim=(2, 3, 4), correction=0)
        return mean, variance

    strips = [x[:, :, a:b] for a, b in bounds(x.shape[2], slices)]
    parts = [checkpoint(moments, strip, use_reentrant=False, preserve_rng_state=False) for strip in strips]
    share = torch.tensor([strip.shape[2] / x.shape[2] for strip in strips], device=x.device)[:, None, None]
    means, variances = (torch.stack(part) for part in zip(*parts, strict=True))  # each (strips, B, groups)
    mean = (share * means).sum(0)
    variance = (share * (variances + (means - mean).square())).sum(0)
    per_group = x.shape[1] // norm.num_groups
    mean, rstd = (repeat(m, "b g -> b (g c)", c=per_group) for m in (mean, (variance + norm.eps).rsqrt()))
    scale = rstd * norm.weight.float()
    return scale[:, :, None, None], (norm.bias.float() - mean * scale)[:, :, None, None]


def norm_silu_conv(norm: nn.GroupNorm, conv: Conv2d, x: Tensor, slices: int = 1) -> Tensor:
    """conv(silu(norm(x))), in `slices` horizontal strips if there is more than one. The strips share the statistics of
    the whole map, so that the result is the same up to rounding."""
    if slices == 1:
        return conv(F.silu(norm(x)))
    scale, shift = affine_of(norm, x, slices)
    return conv_in_strips(conv, x, slices, lambda strip: F.silu((scale * strip).add_(shift).to(x.dtype)))


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + time))), with a 1x1 convolution on the skip where widths differ.

    (B, in, H, W) -> (B, out, H, W). `time_dim` is the width of the time embedding that is added between the two
    convolutions, or None for a block without one (the autoencoder's).
    """

    def __init__(self, in_channels: int, out_channels: int, time_dim: int | None = None, eps: float = 1e-5):
        super().__init__()
        self.norm1 = group_norm(in_channels, eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = Linear(time_dim, out_channels) if time_dim else None
        self.norm2 = group_norm(out_channels, eps)
        self.conv2 = zero_init(Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, time: Tensor | None = None, slices: int = 1) -> Tensor:
        """`time` (B, time_dim) is the embedding after its SiLU, which all blocks share. `slices`: see
        `norm_silu_conv`."""
        h = norm_silu_conv(self.norm1, self.conv1, x, slices)
        if self.time is not None:
            h = h + self.time(time)[:, :, None, None]
        h = norm_silu_conv(self.norm2, self.conv2, h, slices)
        if slices == 1:
            return self.skip(x) + h
        for a, b in bounds(h.shape[2], slices):
            h[:, :, a:b] += self.skip(x[:, :, a:b])
        return h


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution: (B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, slices: int = 1) -> Tensor:
        def double(x: Tensor) -> Tensor:
            return F.interpolate(x, scale_factor=2.0, mode="nearest")

        return self.conv(double(x)) if slices == 1 else conv_in_strips(self.conv, x, slices, double, scale=2)


class Downsample(nn.Module):
    """A strided 3x3 convolution: (B, C, H, W) -> (B, C, H/2, W/2).

    The UNet pads all four sides by one; the autoencoder pads right and bottom only (`asymmetric`).
    """

    def __init__(self, channels: int, asymmetric: bool = False):
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor, slices: int = 1) -> Tensor:
        if slices > 1:
            padding = (0, 1, 0, 1) if self.asymmetric else (1, 1, 1, 1)
            return conv_in_strips(self.conv, x, slices, padding=padding)
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)
