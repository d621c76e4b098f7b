"""LoRA: the identity at first, a sum when merged, and no trace of it afterwards."""

import pytest
import torch
from torch import nn

from methods import lora
from methods.base import generator, replaced


def forward(unet):
    g = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 5, 32, generator=g)
    with torch.no_grad():
        return unet(x, torch.tensor([3, 700]), context)


def attention_layers(unet):
    linear = [(n, m) for n, m in unet.named_modules() if isinstance(m, nn.Linear)]
    return {n for n, _ in linear if ".attn1." in n or ".attn2." in n}


def test_at_first_nothing_changes(tiny_model):
    unet = tiny_model.unet
    plain = forward(unet)
    with lora.adapters(unet, 3, generator(0, "lora")) as matrices:
        assert torch.equal(forward(unet), plain)
        assert {name[:-2] for name in matrices} == attention_layers(unet)
        assert all(m.requires_grad for m in matrices.values())
        assert all(bool(m.any()) == name.endswith(".a") for name, m in matrices.items())


def test_merged_weights_act_like_the_adapters_and_have_the_rank(tiny_model):
    unet = tiny_model.unet
    plain, g = forward(unet), torch.Generator().manual_seed(2)
    with lora.adapters(unet, 2, generator(0, "lora")) as matrices:
        for m in matrices.values():
            m.data.normal_(std=0.2, generator=g)
        adapted = forward(unet)
        kept = {name: m.detach().clone() for name, m in matrices.items()}
    assert torch.equal(forward(unet), plain)
    weights = lora.merged(unet, kept)
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        difference = weight - unet.get_parameter(name)
        assert torch.linalg.matrix_rank(difference, rtol=1e-3) == 2
        torch.testing.assert_close(difference, kept[f"{layer}.b"] @ kept[f"{layer}.a"], atol=1e-5, rtol=1e-4)
    with replaced(unet, weights):
        torch.testing.assert_close(forward(unet), adapted, atol=1e-4, rtol=1e-4)
    assert torch.equal(forward(unet), plain)
    assert not torch.allclose(adapted, plain, atol=1e-2)


def test_gradients_reach_the_matrices_only(tiny_model):
    unet = tiny_model.unet
    with lora.adapters(unet, 2, generator(0, "lora")) as matrices:
        x, context = torch.ones(1, 4, 8, 8), torch.ones(1, 5, 32)
        unet(x, 5, context).square().sum().backward()
        assert all(matrices[name].grad.any() for name in matrices if name.endswith(".b"))
        own = [p for p in unet.parameters() if not any(p is m for m in matrices.values())]
        assert all(p.grad is None for p in own)


def test_layers_come_back_as_the_same_objects_even_after_an_error(tiny_model):
    unet = tiny_model.unet
    before = {name: (type(m), getattr(m, "weight", None)) for name, m in unet.named_modules()}
    names = set(dict(unet.named_parameters()))
    with pytest.raises(RuntimeError, match="midway"), lora.adapters(unet, 2, generator(0, "lora")):
        raise RuntimeError("midway")
    for name, module in unet.named_modules():
        kind, weight = before[name]
        assert type(module) is kind and getattr(module, "weight", None) is weight
    assert set(dict(unet.named_parameters())) == names


def test_rank_is_capped_by_the_layer(tiny_model):
    with lora.adapters(tiny_model.unet, 10_000, generator(0, "lora")) as matrices:
        for name, m in matrices.items():
            layer = tiny_model.unet.get_submodule(name[:-2])
            assert min(m.shape) <= min(layer.weight.shape)
