"""Building blocks shared by the UNet and the autoencoder (Rombach et al., 2022; He et al., 2016)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def zero_init(module: nn.Module) -> nn.Module:
    """Set all parameters of a last layer to zero, so that its block starts out as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=eps)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + time))), with a 1x1 convolution on the skip where widths differ.

    (B, in, H, W) -> (B, out, H, W). `time_dim` is the width of the time embedding that is added between the two
    convolutions, or None for a block without one (the autoencoder's).
    """

    def __init__(self, in_channels: int, out_channels: int, time_dim: int | None = None, eps: float = 1e-5):
        super().__init__()
        self.norm1 = group_norm(in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_dim, out_channels) if time_dim else None
        self.norm2 = group_norm(out_channels, eps)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """`time` (B, time_dim) is the embedding after its SiLU, which all blocks share."""
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time is not None:
            h = h + self.time(time)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution: (B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    """A strided 3x3 convolution: (B, C, H, W) -> (B, C, H/2, W/2).

    The UNet pads all four sides by one; the autoencoder pads right and bottom only (`asymmetric`).
    """

    def __init__(self, channels: int, asymmetric: bool = False):
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)
