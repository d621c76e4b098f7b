"""The optimisation loop's ways of saving memory, and what it hands back."""

import math

import pytest
import torch
from torch import nn

from benchmarks.memory import Calculated, calculating
from errors import InputError
from methods.base import OPTIMIZERS, Reporter, fitted, minimise, replaced, trainable


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(20, 24, 3), nn.SiLU(), nn.Flatten(), nn.Linear(24, 18)).to(dtype)


def fit(model, optimizer, lean, steps=6, lr=1e-2):
    x, y = (
        torch.randn(4, n, generator=torch.Generator().manual_seed(n)).to(next(model.parameters())) for n in (180, 18)
    )

    def terms():
        error = model(x.view(4, 20, 3, 3)).float() - y.float()
        return {"square": error.square().mean(), "size": error.abs().mean()}

    params = list(model.parameters())
    return minimise(terms, params, steps, lr, optimizer, "fit", "lr", Reporter(), lean)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_by_one_gives_the_very_same_bits(optimizer, dtype):
    models = [network(dtype) for _ in range(3)]
    curves = [fit(model, optimizer, lean) for model, lean in zip(models, (False, True), strict=False)]
    assert all(torch.equal(curves[0][name], curves[1][name]) for name in ("loss", "square", "size"))
    for plain, lean, start in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(plain, lean) and not torch.equal(plain, start)
        assert plain.grad is None and lean.grad is None and not lean._post_accumulate_grad_hooks


def test_adafactor_is_the_papers_without_its_relative_step():
    """Algorithm 4 of Shazeer & Stern with eps_1 = 1e-30, d = 1, beta_2t = 1 - t^-0.8, and a fixed step length."""
    w = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)).double()
    target = torch.randn(20, 30, generator=torch.Generator().manual_seed(1)).double()
    p, lr = w.float().requires_grad_(), 0.03
    minimise(lambda: {"l": (p - target.float()).square().sum()}, [p], 5, lr, "adafactor", "s", "lr", Reporter())
    r, c = torch.zeros(20, 1).double(), torch.zeros(1, 30).double()
    for t in range(1, 6):
        grad, beta = 2 * (w - target), 1 - t**-0.8
        r = beta * r + (1 - beta) * (grad**2 + 1e-30).mean(1, keepdim=True)
        c = beta * c + (1 - beta) * (grad**2 + 1e-30).mean(0, keepdim=True)
        u = grad / (r @ c / r.mean()).sqrt()
        w = w - lr * u / max(1.0, float(u.square().mean().sqrt()))
    torch.testing.assert_close(p.detach().double(), w, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("optimizer", ["adam", "adafactor"])
def test_the_learning_rate_is_the_length_of_a_step(optimizer):
    """Of the first step, in root mean square, whatever the size of weights and gradients."""
    for size in (1e-2, 1e3):
        p = torch.full((20, 20), size, requires_grad=True)
        minimise(lambda p=p, s=size: {"l": s * p.sum()}, [p], 1, 1e-3, optimizer, "s", "lr", Reporter())
        assert float((p.detach() - size).square().mean().sqrt()) == pytest.approx(1e-3, rel=0.05)


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_parameter_moves_for_a_loss_that_is_no_number(lean, value):
    p, hooks = torch.ones(3, requires_grad=True), []

    def terms():
        hooks.append(p._post_accumulate_grad_hooks)
        return {"l": p.sum() * value}

    with pytest.raises(InputError, match="at step 0"):
        minimise(terms, [p], 3, 0.1, "adam", "s", "lr", Reporter(), lean)
    assert torch.equal(p, torch.ones(3)) and p.grad is None
    assert bool(hooks[0]) is False if not lean else not p._post_accumulate_grad_hooks


def test_adafactor_and_one_by_one_take_as_little_as_they_say():
    """Sixteen layers of 256 x 256 in bfloat16, in units of their bytes in float32. The peak holds the weights (1/2),
    the float32 copies (1), Adam's two moments (2), and the gradients: all (1), or of one layer at a time."""
    unit = 16 * 256 * 256 * 4

    def peak(optimizer, lean):
        memory = Calculated()
        with calculating(memory), torch.device("meta"):
            layers = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(16))).bfloat16()
            x = torch.empty(1, 256, dtype=torch.bfloat16)
            terms = lambda: {"l": layers(x).float().square().mean()}
            minimise(terms, list(layers.parameters()), 2, 1e-3, optimizer, "s", "lr", Reporter(), lean)
        return memory.peak() / unit

    assert peak("adam", False) == pytest.approx(4.5, abs=0.4)
    assert peak("adam", True) == pytest.approx(3.5, abs=0.4)
    assert peak("adafactor", True) == pytest.approx(1.5, abs=0.4)


def test_values_that_fit_are_used_and_others_copied():
    layer = nn.Linear(64, 64).requires_grad_(False)
    own = layer.weight.data_ptr()
    for value, used in [
        (torch.zeros(64, 64), True),
        (torch.zeros(64, 64, dtype=torch.float64), False),
        (torch.zeros(64, 64).T, False),
        (torch.zeros(64 * 64 + 1)[1:].view(64, 64), False),  # not aligned, as in a file mapped into memory
    ]:
        assert (fitted(value, layer.weight).data_ptr() == value.data_ptr()) is used
        with replaced(layer, {"weight": value}) as parameters:
            assert parameters["weight"] is layer.weight
            assert (layer.weight.data_ptr() == value.data_ptr()) is used
            assert layer.weight.dtype == torch.float32 and layer.weight.stride() == (64, 1) and not layer.weight.any()
        assert layer.weight.data_ptr() == own and layer.weight.any()


def test_an_accelerator_holds_one_set_of_weights():
    """The meta device stands in for the card."""
    memory = Calculated()
    with memory, torch.device("meta"):
        layers = nn.Sequential(*(nn.Linear(500, 500, bias=False) for _ in range(10))).requires_grad_(False)
        names = [name for name, _ in layers.named_parameters()]
        memory.reset()
        with trainable(layers, names) as parameters:
            assert memory.now() == 10_000_000 and all(p.requires_grad for p in parameters.values())
        assert memory.now() == 10_000_000 and memory.peak() == 11_000_000
        memory.reset()
        with replaced(layers, {name: torch.zeros(500, 500, device="cpu") for name in names}):
            assert memory.now() == 10_000_000
        assert memory.now() == 10_000_000 and memory.peak() == 11_000_000


def test_what_a_failed_backward_pass_left_is_cleared():
    layer = nn.Linear(4, 4).requires_grad_(False)
    with pytest.raises(RuntimeError, match="midway"), trainable(layer, ["weight", "bias"]):
        layer(torch.ones(1, 4)).sum().backward()
        raise RuntimeError("midway")
    assert layer.weight.grad is None and layer.bias.grad is None
