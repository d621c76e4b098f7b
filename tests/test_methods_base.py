"""What methods share: checks of settings, seeded noise, borrowed weights and the optimisation loop."""

import math

import pytest
import torch
from hydra.utils import get_class
from torch import nn

from errors import InputError
from evaluation import config
from methods.base import Run
from methods.ddim_inversion import DDIMInversion
from methods.ddpm_inversion import DDPMInversion
from methods.direct_inversion import DirectInversion
from methods.imagic import Imagic
from methods.inversion import Inversion
from methods.masactrl import MasaCtrl
from methods.optimisation import OPTIMIZERS, minimise
from methods.prompt_to_prompt import PromptToPrompt
from methods.sdedit import SDEdit
from samplers import Sampler


def fit(dtype, optimizer, lean):
    """Six steps of a small network in `dtype`: (curves, its parameters, the most gradients that existed at once)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(20, 24, 3), nn.SiLU(), nn.Flatten(), nn.Linear(24, 18)).to(dtype)
    x, y = torch.randn(4, 20, 3, 3).to(dtype), torch.randn(4, 18)
    params, alive = list(net.parameters()), []

    def terms():
        error = net(x).float() - y
        return {"square": error.square().mean(), "size": error.abs().mean()}

    for p in params:
        p.register_post_accumulate_grad_hook(lambda _: alive.append(sum(q.grad is not None for q in params)))
    return minimise(terms, params, Run(), "fit", 6, 1e-2, optimizer, lean), params, max(alive)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lean_has_one_gradient_at_a_time_and_the_very_same_bits(optimizer, dtype):
    curves, params, gradients = fit(dtype, optimizer, False)
    lean_curves, lean_params, lean_gradients = fit(dtype, optimizer, True)
    assert curves == lean_curves and list(curves) == ["loss", "square", "size"]
    assert all(torch.equal(a, b) and a.grad is b.grad is None for a, b in zip(params, lean_params, strict=True))
    assert gradients == 4 and lean_gradients == 1


def test_the_optimisers_update_rules():
    def run(optimizer, steps, lr, dtype=torch.float32):
        x = torch.tensor([2.0], dtype=dtype)
        minimise(lambda: {"square": (x**2).sum()}, [x], Run(), "fit", steps, lr, optimizer)
        return float(x.detach())

    assert run("adam", 1, 0.1) == pytest.approx(1.9, rel=1e-5)  # Adam's first step is lr long
    assert run("adafactor", 1, 1e-3) == pytest.approx(1.999, rel=1e-4)  # and so is Adafactor's
    # Steps that bfloat16 cannot tell from nothing add up all the same.
    assert run("adam", 40, 1e-3, torch.bfloat16) == pytest.approx(1.96, abs=0.01)


@pytest.mark.parametrize("lean, value", [(False, math.nan), (True, math.inf)])
def test_no_parameter_moves_for_a_loss_that_is_not_finite(lean, value):
    p = torch.ones(3)
    with pytest.raises(InputError, match=r"fit.* step 0"):
        minimise(lambda: {"loss": p.sum() * value}, [p], Run(), "fit", 3, 0.1, "adam", lean)
    assert torch.equal(p, torch.ones(3)) and p.grad is None and not p._post_accumulate_grad_hooks


def test_noise_depends_on_seed_and_stage_alone():
    draws = [torch.randn(4, generator=Run(s).noise(*key)) for s, key in [(0, "a"), (0, "b"), (1, "a"), (0, ("a", 1))]]
    assert all(not torch.equal(draws[i], draws[j]) for i in range(4) for j in range(i))
    assert torch.equal(draws[0], torch.randn(4, generator=Run(0).noise("a")))


def test_a_picture_that_is_not_finite_is_refused(tiny_model, task, edit, monkeypatch):
    """Clamped first, an infinite one would pass for white."""
    for value in (math.inf, math.nan):
        monkeypatch.setattr(tiny_model, "decode_latents", lambda z, value=value: torch.full((1, 3, 4, 4), value))
        with pytest.raises(InputError, match="NaN or infinite"):
            edit(SDEdit(Sampler(steps=1)), tiny_model, task)


KINDS = [get_class(choice.target) for choice in config.choices() if choice.group in ("method", "inversion")]
TEXTS = {"inversion_prompt", "negative_prompt", "blend_word"}


def made(kind, **settings):
    """A method, or an inversion."""
    parts = {"sampler": Sampler(eta=float(kind is DDPMInversion)), "inversion": Inversion()}
    return kind(**{name: part for name, part in parts.items() if name in kind.__dataclass_fields__} | settings)


def refuses(kind, name, value, **others):
    with pytest.raises(InputError, match=rf"{'' if name == 'sampler' else kind.group}\.?{name}"):
        made(kind, **{name: value} | others)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_and_choices_out_of_range_are_named(kind):
    for name, field in kind.__dataclass_fields__.items():
        wrong = ["other"] if field.type is str and name not in TEXTS else []
        if type(field.default) in (int, float):
            wrong = [-1, math.nan, math.inf, "x", [], None] + [1.5] * ("int" in str(field.type))
        for value in wrong:
            refuses(kind, name, value)


@pytest.mark.parametrize(
    "kind, name, value, others",
    [
        (Imagic, "eta", [0.5, 1.1], {}), (Imagic, "lora_rank", 0, {}), (SDEdit, "strength", 1.1, {}),
        (DirectInversion, "edit_strength", [0.3, 0.6], {}), (DirectInversion, "alpha", 0.5, {}),  # ignored by cosine
        (DirectInversion, "structural_similarity", 0.5, {"mix": "linear"}), (DirectInversion, "num_samples", 2, {}),
        (PromptToPrompt, "guidance_scale", 0.0, {}), (MasaCtrl, "start_step", 50, {}),
        (DirectInversion, "num_samples", 2, {"mix": "gaussian", "alpha": 1.0, "beta": 1.0}),
        (PromptToPrompt, "reweight", {"dog": "much"}, {}), (DDPMInversion, "sampler", Sampler(), {}),
        (PromptToPrompt, "reweight", {"dog": math.nan}, {}), (DDIMInversion, "sampler", Sampler(eta=0.5), {}),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_named(kind, name, value, others):
    refuses(kind, name, value, **others)
