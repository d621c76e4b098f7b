"""The autoencoder in slices: the same numbers and gradients, from strips that no one sees."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.memory import Calculated
from models.autoencoder import Autoencoder
from models.blocks import Downsample, Upsample, group_norm, norm_silu_conv


def seeded(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(scope="module")
def autoencoder():
    """Three levels, one residual block each, none of its parameters zero."""
    torch.manual_seed(0)
    model = Autoencoder(ch=32, ch_mult=(1, 2, 2), num_res_blocks=1)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model.requires_grad_(False)


@pytest.fixture
def sliced(autoencoder):
    return copy.deepcopy(autoencoder)


@pytest.mark.parametrize("slices", [2, 3, 5, 8])
@pytest.mark.parametrize("size", [(32, 20), (52, 36)], ids=str)  # 8x5 and 13x9 latents
def test_slices_change_nothing_but_memory(autoencoder, sliced, slices, size):
    sliced.slices = slices
    x = 3 * seeded(2, 3, *size) + 1  # far from zero mean: a halo of the wrong value would show
    for ours, plain in zip(sliced.posterior(x), autoencoder.posterior(x), strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    z = autoencoder.encode(x)
    torch.testing.assert_close(sliced.decode(z), autoencoder.decode(z), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("slices", [2, 3, 50])
@pytest.mark.parametrize(("height", "width"), [(4, 4), (5, 7), (9, 6), (1, 3)])
def test_every_convolution_sees_its_neighbours(slices, height, width):
    """Odd sizes, strips of one row, and more strips than rows, for each kind of convolution."""
    torch.manual_seed(1)
    x = 2 * seeded(2, 32, height, width) + 3
    norm, conv = group_norm(32, eps=1e-6), nn.Conv2d(32, 4, 3, padding=1)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    with torch.no_grad():
        expected = conv(F.silu(norm(x)))
        torch.testing.assert_close(norm_silu_conv(norm, conv, x, slices), expected, atol=1e-5, rtol=1e-5)
        for layer in (Upsample(32), Downsample(32), Downsample(32, asymmetric=True)):
            if height > 1:  # below that, halving without padding above leaves nothing
                torch.testing.assert_close(layer(x, slices), layer(x), atol=1e-5, rtol=1e-5)


def test_gradients_are_the_same(autoencoder, sliced):
    sliced.slices = 3
    grads = []
    for model in (copy.deepcopy(autoencoder), sliced):
        model.requires_grad_(True)
        x = seeded(2, 3, 20, 12).requires_grad_()
        loss = model.decode(model.encode(x)).square().mean()
        named = dict(model.named_parameters()) | {"x": x}
        grads.append(dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True)))
    for name, grad in grads[0].items():
        torch.testing.assert_close(
            grads[1][name], grad, atol=1e-5 * float(grad.abs().max()) + 1e-7, rtol=1e-4, msg=name
        )


def test_half_precision_is_as_near_as_it_is_without(autoencoder, sliced):
    sliced.slices = 4
    z = seeded(1, 4, 8, 8)
    exact, half = autoencoder.decode(z), copy.deepcopy(autoencoder).bfloat16().decode(z.bfloat16()).float()
    ours = sliced.bfloat16().decode(z.bfloat16())
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - exact).std() < 1.2 * (half - exact).std()


def test_memory_is_that_of_the_maps_between_convolutions():
    """In units of one map: what lies between input and output (normalised, activated) exists strip by strip, and for
    the gradients neither is kept."""
    size, kept, peak = 128 * 64 * 64 * 4, {}, {}
    for slices in (1, 8):
        memory = Calculated()
        with memory, torch.device("meta"):
            norm, conv, x = group_norm(128, eps=1e-6), nn.Conv2d(128, 128, 3, padding=1), torch.empty(1, 128, 64, 64)
            before = memory.now()
            with torch.no_grad():
                norm_silu_conv(norm, conv, x, slices)
            peak[slices] = (memory.peak() - before) / size
            out = norm_silu_conv(norm, conv, x.requires_grad_(), slices)
            kept[slices] = (memory.now() - before) / size - 1
            del out
    assert peak[1] == pytest.approx(2, abs=0.1) and peak[8] < 1.6
    assert kept[1] == pytest.approx(2, abs=0.1) and kept[8] < 0.1


def test_the_setting_reaches_both_networks(autoencoder, monkeypatch):
    """Equal results alone would not show that anything is sliced."""
    import models.blocks

    seen = []
    plain = models.blocks.conv_in_strips
    monkeypatch.setattr(models.blocks, "conv_in_strips", lambda *a, **k: seen.append(a[2]) or plain(*a, **k))
    monkeypatch.setattr(autoencoder, "slices", 3)
    autoencoder.decode(autoencoder.encode(seeded(1, 3, 16, 16)))
    assert set(seen) == {3} and len(seen) >= 20
