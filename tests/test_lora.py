"""LoRA: no change at first, the papers' sum once it has moved, and no trace of it afterwards."""

import copy

import pytest
import torch
from torch import nn

from methods import lora
from methods.base import Run
from methods.optimisation import restored


def forward(unet):
    g = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 5, 32, generator=g)
    return unet(x, torch.tensor([3, 700]), context)


@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_it_starts_as_nothing_and_leaves_nothing_even_after_an_error(tiny_model, compiled):
    unet = copy.deepcopy(tiny_model.unet)
    if compiled:
        unet.compile(backend="eager")
    plain, names = forward(unet), {n for n, m in unet.named_modules() if isinstance(m, nn.Linear)}
    with pytest.raises(RuntimeError, match="midway"), lora.adapters(unet, 3, Run().noise("lora")) as matrices:
        assert torch.equal(forward(unet), plain)
        assert {name[:-2] for name in matrices} == {n for n in names if ".attn1." in n or ".attn2." in n}
        assert all(bool(m.any()) == name.endswith(".a") for name, m in matrices.items())
        for m in matrices.values():
            m.add_(1)
        assert not torch.allclose(forward(unet), plain, atol=1e-2)
        raise RuntimeError("midway")
    assert torch.equal(forward(unet), plain)


@torch.no_grad()
def test_it_acts_like_the_sum_of_weight_and_low_rank_product(tiny_model):
    unet, g = tiny_model.unet, torch.Generator().manual_seed(2)
    with lora.adapters(unet, 40, Run().noise("lora")) as matrices:
        for name, m in matrices.items():
            assert min(m.shape) <= min(40, *unet.get_submodule(name[:-2]).weight.shape)  # a higher rank adds nothing
            m.normal_(std=0.05, generator=g)
        adapted = forward(unet)
    layers = {name[:-2] for name in matrices}
    with restored(unet, [f"{layer}.weight" for layer in layers]) as weights:
        for layer in layers:
            weights[f"{layer}.weight"] += matrices[f"{layer}.b"] @ matrices[f"{layer}.a"]
        torch.testing.assert_close(forward(unet), adapted, atol=1e-4, rtol=1e-4)
