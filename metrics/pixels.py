"""Likeness of pixels: PSNR, MSE and SSIM. Images are (..., 3, H, W) in [-1, 1]; `kept`, where given, is a mask
(1, 1, H, W) of bool, and only the pixels where it is true count."""

import math

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor


def psnr(a: Tensor, b: Tensor, kept: Tensor | None = None) -> float:
    """Peak signal-to-noise ratio in dB over the whole range of the images; 100 at most, which stands for equal."""
    error = mse(a, b, kept)
    return min(-10 * math.log10(error), 100.0) if error else 100.0


def mse(a: Tensor, b: Tensor, kept: Tensor | None = None) -> float:
    """The mean squared difference of pixels that range from 0 to 1."""
    squared = ((a.float() - b.float()) / 2).clamp(-1, 1).square()
    return (squared if kept is None else squared[kept.expand_as(squared)]).mean().item()


def ssim(a: Tensor, b: Tensor, kept: Tensor | None = None) -> float:
    """Structural similarity (Wang et al., 2004), in [-1, 1], of images (B, 3, H, W) of at least 6 pixels a side: the
    mean of its map over all pixels and channels, with a Gaussian window of 11 pixels and sigma 1.5, reflected at the
    border. What is not kept is black in both, so that it does not reach into the windows of what is."""
    if kept is not None:
        a, b = black_but(a, kept), black_but(b, kept)
    a, b = (a.double() + 1) / 2, (b.double() + 1) / 2
    c1, c2 = 0.01**2, 0.03**2
    mean_a, mean_b = window(a), window(b)
    var_a, var_b = window(a * a) - mean_a**2, window(b * b) - mean_b**2
    covariance = window(a * b) - mean_a * mean_b
    likeness = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    likeness = likeness * (2 * covariance + c2) / (var_a + var_b + c2)
    return (likeness if kept is None else likeness[kept.expand_as(likeness)]).mean().item()


def window(x: Tensor) -> Tensor:
    """The Gaussian-weighted mean around each pixel of (B, C, H, W)."""
    weights = torch.exp(-(torch.arange(-5, 6, device=x.device, dtype=x.dtype) ** 2) / (2 * 1.5**2))
    weights = weights / weights.sum()
    x = F.pad(x, (5, 5, 5, 5), mode="reflect")
    channels = x.shape[1]
    x = F.conv2d(x, repeat(weights, "k -> c 1 k 1", c=channels), groups=channels)
    return F.conv2d(x, repeat(weights, "k -> c 1 1 k", c=channels), groups=channels)


def black_but(image: Tensor, shown: Tensor | None) -> Tensor:
    """The image, black wherever the mask `shown` is false, as PIE-Bench restricts what is measured to a part."""
    return image if shown is None else torch.where(shown, image, -1.0)
