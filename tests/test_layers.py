"""The convolutions and products of models/layers.py against PyTorch's own, in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from models import layers
from models.attention import attention
from models.layers import Conv2d, Linear, as_product, conv2d, winograd

LAST = torch.channels_last


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(found, x, weight, bias):
    """The largest, in units of the result's standard deviation."""
    true = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=1)
    assert found.shape == true.shape
    return float((found - true).abs().max() / true.std())


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 3),
    c_in=st.integers(1, 40),
    c_out=st.integers(1, 40),
    half_height=st.integers(1, 12),
    half_width=st.integers(1, 12),
    tiles=st.integers(1, 40),
    filters=st.integers(1, 40),
    biased=st.booleans(),
    last=st.booleans(),
)
def test_winograd_and_one_product_are_the_convolution(
    batch, c_in, c_out, half_height, half_width, tiles, filters, biased, last
):
    x = draw(batch, c_in, 2 * half_height, 2 * half_width)
    weight, bias = draw(c_out, c_in, 3, 3, seed=1), draw(c_out, seed=2) if biased else None
    if last:
        x, weight = x.contiguous(memory_format=LAST), weight.contiguous(memory_format=LAST)
    assert error(as_product(x, weight, bias), x, weight, bias) < 1e-5
    with pytest.MonkeyPatch.context() as patch:  # strips and parts of any size, and last ones that are smaller
        patch.setattr(layers, "TILES", tiles)
        patch.setattr(layers, "FILTERS", filters)
        assert error(winograd(x, weight, bias), x, weight, bias) < 1e-5


@pytest.mark.parametrize(("channels", "side"), [(640, 12), (256, 16), (320, 32)])
def test_winograd_rounds_no_worse_than_the_direct_way(channels, side):
    x = draw(1, channels, side, side).contiguous(memory_format=LAST)
    weight = draw(channels, channels, 3, 3, seed=1).contiguous(memory_format=LAST)
    direct = error(F.conv2d(x, weight, padding=1), x, weight, None)
    assert error(winograd(x, weight, None), x, weight, None) < 1.2 * direct  # less than half of it with AVX2


def test_nan_stays_in_its_neighbourhood_and_in_its_image():
    x = draw(2, 8, 8, 8)
    x[0, 3, 2, 2] = float("nan")
    for way in (winograd, as_product):
        bad = way(x, draw(8, 8, 3, 3, seed=1), None).isnan()
        assert bad[0, :, 1:4, 1:4].all() and not bad[1].any() and not bad[0, :, 4:].any() and not bad[0, :, :, 4:].any()


@pytest.fixture
def ways(monkeypatch):
    """What was taken instead of PyTorch's convolution, in the order of the calls."""
    taken = []
    for name in ("winograd", "as_product"):
        own = getattr(layers, name)
        monkeypatch.setattr(layers, name, lambda *a, own=own, name=name: taken.append(name) or own(*a))
    return taken


@pytest.mark.parametrize(
    ("c_in", "c_out", "side", "kernel", "stride", "way"),
    [
        (256, 256, 16, 3, 1, "winograd"),
        (256, 320, 8, 3, 1, "as_product"),
        (256, 256, 11, 3, 1, None),  # no whole tiles
        (256, 256, 16, 3, 2, None),
        (64, 256, 16, 3, 1, None),
        (256, 256, 16, 1, 1, None),
        (64, 64, 6, 1, 2, None),
    ],
)
def test_each_convolution_takes_its_way_and_gives_the_same(ways, c_in, c_out, side, kernel, stride, way):
    layer = Conv2d(c_in, c_out, kernel, stride=stride, padding=kernel // 2)
    x = draw(2, c_in, side, side)
    plain = layer(x)
    assert ways == [] and plain.requires_grad  # it is learning
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain)
        assert ways == []  # channels are not last
        layer.to(memory_format=LAST)
        found = layer(x.contiguous(memory_format=LAST))
        assert ways == ([way] if way else []) and found.is_contiguous(memory_format=LAST)
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
        # A map that is not laid out like the weights is right all the same.
        torch.testing.assert_close(layer(x), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", [8, 16])
def test_a_bias_learns_alone(ways, side):
    layer = Conv2d(256, 256, 3, padding=1).to(memory_format=LAST)
    layer.weight.requires_grad_(False)
    layer(draw(1, 256, side, side)).sum().backward()
    assert layer.bias.grad.allclose(torch.tensor(float(side**2))) and ways == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("emulated", [False, True])
def test_half_precision_differs_by_its_rounding_only(monkeypatch, dtype, emulated):
    """In float32 on the way, or not: the result is that of float32 to within a rounding or two."""
    monkeypatch.setattr(layers, "_emulated", lambda _: emulated)
    conv, line = Conv2d(256, 256, 3, padding=1).to(dtype, memory_format=LAST), Linear(64, 32).to(dtype)
    x, y = draw(1, 256, 16, 16).to(dtype), draw(2, 5, 64).to(dtype)
    q, k, v = draw(3, 2, 4, 30, 16).to(dtype)
    eps = torch.finfo(dtype).eps
    with torch.no_grad():
        pairs = [
            (conv(x), F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)),
            (line(y), F.linear(y.double(), line.weight.double(), line.bias.double())),
            (attention(q, k, v), attention(q.double(), k.double(), v.double(), "reference")),
        ]
    for found, true in pairs:
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), true.double(), rtol=4 * eps, atol=4 * eps)


def test_emulated_layers_learn(monkeypatch):
    monkeypatch.setattr(layers, "_emulated", lambda _: True)
    weight, x = draw(8, 8, 3, 3).bfloat16().requires_grad_(), draw(1, 8, 6, 6, seed=1).bfloat16().requires_grad_()
    conv2d(x, weight, None, padding=1).float().square().sum().backward()
    exact, y = weight.detach().double().requires_grad_(), x.detach().double().requires_grad_()
    F.conv2d(y, exact, padding=1).square().sum().backward()
    for found, true in ((weight, exact), (x, y)):
        assert found.grad.dtype == torch.bfloat16
        assert (found.grad - true.grad).norm() < 0.02 * true.grad.norm()
