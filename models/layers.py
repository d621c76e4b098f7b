"""Convolution and matrix product as the networks call them: PyTorch's own, and on a CPU what is faster there.

Inference on a CPU takes 3x3 convolutions of many channels through Winograd's minimal filtering (Lavin & Gray, 2016,
arXiv 1509.09308), which needs 2.25 times fewer products and rounds no worse, and on small maps through one matrix
product, because there a convolution spends its time on reordering the weights; both where the weights lie channels
last. Half precision on a CPU without instructions for it is computed in float32, from weights that stay as they are.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

MANY = 256  # channels; with fewer, moving tiles costs more than is saved
SMALL = 100  # pixels; on smaller maps, transforming the filters does
TILES = 512  # that go through one batched product: their channels, 16 numbers each, about fit the last cache
FILTERS = 256  # that are transformed at a time, likewise


class Linear(nn.Linear):
    """x W^T + b over the last dimension, (..., in) -> (..., out)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    """(B, in, H, W) -> (B, out, H', W'), without groups, dilation or padding other than zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight, self.bias, self.stride[0], self.padding[0])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: x (..., in), weight (out, in) -> (..., out)."""
    if emulated(x.device, weight.dtype):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    return F.linear(x, weight, bias)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0) -> Tensor:
    """The convolution of x (B, in, H, W) with weight (out, in, kernel, kernel), by whichever way is the fastest."""
    if emulated(x.device, weight.dtype):
        bias = None if bias is None else bias.float()
        return _conv2d(x.float(), weight, bias, stride, padding).to(x.dtype)
    return _conv2d(x, weight, bias, stride, padding)


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """The same for an x that can be computed with; the weight may be of a dtype that cannot."""
    height, width = x.shape[-2:]
    learning = torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (x, weight, bias))
    plain = x.device.type != "cpu" or x.dtype != torch.float32 or learning or torch.compiler.is_compiling()
    if not plain and weight.is_contiguous(memory_format=torch.channels_last):
        if weight.shape[2:] == (1, 1) and stride == 1:
            return linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
        if weight.shape[2:] == (3, 3) and (stride, padding) == (1, 1) and min(weight.shape[:2]) >= MANY:
            if height * width <= SMALL:
                return as_product(x, weight, bias)
            if height % 2 == width % 2 == 0:
                return winograd(x, weight, bias)
    return F.conv2d(x, weight.to(x.dtype), bias, stride, padding)


def constant(function):
    """Let a compiled network take for constant what `function` returns while it is compiled. As
    torch.compiler.assume_constant_result, which would import torch._dynamo here and now, and take seconds."""
    function._dynamo_marked_constant = True
    return function


@constant
def emulated(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of `dtype` on `device` are made of steps so slow that those of float32 are several times
    faster."""
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and _emulated(dtype)


@functools.cache
def _emulated(dtype: torch.dtype) -> bool:
    ops = torch.ops.mkldnn
    return not (ops._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else ops._is_mkldnn_fp16_supported())


def as_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 3x3 convolution with padding 1 as one product of its neighbourhoods, (B H W, 9 in), with the weights."""
    b, c, h, w = x.shape
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).contiguous()
    image, row, column, _ = x.stride()
    patches = x.as_strided((b, h, w, 3, 3 * c), (image, row, column, row, 1)).reshape(b, h, w, 9 * c)
    return linear(patches, rearrange(weight, "o i y x -> o (y x i)").float(), bias).permute(0, 3, 1, 2)


def winograd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 3x3 convolution with padding 1 by F(2x2, 3x3): Y = A^T [(G g G^T) * (B^T d B)] A, equations 8 and 10 of Lavin &
    Gray; x (B, in, H, W), float32 with even sides -> (B, out, H, W), channels last.

    Tiles d of 4x4 pixels, two apart, give 2x2 pixels each. In strips of rows, so that what lies between x and the
    result stays small.
    """
    b, c, h, w = x.shape
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).contiguous()
    out = x.new_empty(b, h, w, len(weight))
    rows = max(1, TILES // (b * w // 2))  # of tiles, in a strip
    filters = map(transformed_filters, weight.split(FILTERS))
    if rows < h // 2:
        filters = list(filters)  # for every strip the same
    for top in range(0, h, 2 * rows):
        strip = x[:, top : top + 2 * rows + 2]
        n = strip.shape[1] // 2 - 1
        by_row = transformed_tiles([strip[:, i : i + 2 * n : 2] for i in range(4)])
        tiles = transformed_tiles([by_row[:, :, :, j : j + w : 2] for j in range(4)])  # (4 x, 4 y, b, n, w/2, in)
        first = 0
        for u in filters:
            product = torch.bmm(tiles.view(16, -1, c), u.mT)
            if bias is not None:
                product[5] += bias[first : first + u.shape[1]]  # the one of the 16 that all four pixels add once
            m = product.view(4, 4, b, n, w // 2, -1)
            y = out[:, top : top + 2 * n, :, first : first + u.shape[1]]
            y = rearrange(y, "b (n y) (w x) o -> y x b n w o", y=2, x=2)
            untransform(untransform(m, m.new_empty(2, *m.shape[1:])).transpose(0, 1), y)
            first += u.shape[1]
    return out.permute(0, 3, 1, 2)


def transformed_filters(g: Tensor) -> Tensor:
    """G g G^T: (out, in, 3, 3) -> (16, out, in) float32, columns before rows."""

    def transform(g: Tensor) -> Tensor:
        out = g.new_empty(4, *g.shape[1:])
        half = g[1] * 0.5
        mean = torch.add(g[0], g[2]).mul_(0.5)
        out[0], out[3] = g[0], g[2]
        torch.add(mean, half, out=out[1])
        torch.sub(mean, half, out=out[2])
        return out

    by_row = transform(g.float().permute(2, 3, 0, 1))
    return transform(by_row.transpose(0, 1)).flatten(0, 1)


def transformed_tiles(d: list[Tensor]) -> Tensor:
    """B^T d, for four equal slices d -> (4, ...)."""
    out = d[0].new_empty(4, *d[0].shape)
    torch.sub(d[0], d[2], out=out[0])
    torch.add(d[1], d[2], out=out[1])
    torch.sub(d[2], d[1], out=out[2])
    torch.sub(d[1], d[3], out=out[3])
    return out


def untransform(m: Tensor, out: Tensor) -> Tensor:
    """A^T m: (4, ...) -> out (2, ...)."""
    torch.add(m[0], m[1], out=out[0]).add_(m[2])
    torch.sub(m[1], m[2], out=out[1]).sub_(m[3])
    return out
