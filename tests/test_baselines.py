"""SDEdit, DDIM inversion and DDPM inversion: what each gives back exactly, and the walks written out by hand."""

import math
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import hydra
import pytest
import torch
from conftest import TINY, randomised
from hydra.utils import instantiate

import models
from data.tasks import EditTask
from errors import InputError
from methods.base import Reporter, generator
from methods.ddim_inversion import DDIMInversion
from methods.ddpm_inversion import DDPMInversion
from methods.direct_inversion import DirectInversion
from methods.imagic import Imagic
from methods.negative_prompt import NegativePrompt
from methods.null_text import NullText
from methods.pnp_inversion import PnPInversion
from methods.prompt_to_prompt import PromptToPrompt
from methods.sdedit import SDEdit
from samplers import NoiseSchedule, Sampler, ddim, guided, noise_like

CONF = Path(__file__).resolve().parent.parent / "conf"
KINDS = [Sampler("ddpm", 5), Sampler("ddim", 5, eta=1.0), Sampler("ddim", 5, eta=0.3)]


@pytest.fixture(scope="module")
def task():
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return EditTask(image, "a red dog", "a red cat")


def close(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def decoded(model, z):
    return model.decode_latents(z)[0].float().clamp(-1, 1)


@pytest.mark.parametrize("kind", [SDEdit, DDIMInversion, DDPMInversion])
def test_a_model_is_handed_back_and_no_source_prompt_is_needed(tiny_model, task, kind):
    before = tiny_model.fingerprint
    result = kind(Sampler(steps=2, eta=float(kind is DDPMInversion))).edit(tiny_model, replace(task, source_prompt=""))
    assert result.edits[0].image.shape == (3, 32, 32) and result.reconstruction.shape == (3, 32, 32)
    assert tiny_model.fingerprint == before and not any(p.requires_grad for p in tiny_model.parameters())


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (SDEdit, {"strength": 1.1}), (SDEdit, {"guidance_scale": -1}), (SDEdit, {"num_samples": 0}),
        (DDIMInversion, {"guidance_scale": -1}), (DDIMInversion, {"inversion_scale": "x"}),
        (DDIMInversion, {"fixed_point_steps": 0.5}), (DDPMInversion, {"skip": -0.1}),
        (DDPMInversion, {"guidance_scale": math.inf}), (DDPMInversion, {"source_guidance_scale": -1}),
        (DDPMInversion, {"num_samples": 1.5}),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(kind, settings):
    with pytest.raises(InputError, match=rf"method\.{next(iter(settings))}"):
        kind(Sampler("ddpm" if kind is DDPMInversion else "ddim"), **settings)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (SDEdit, {"strength": 1.0}), (DDIMInversion, {"inversion_scale": 2.0}), (DDPMInversion, {"skip": 0.0}),
        (PromptToPrompt, {}), (NullText, {"inner_steps": 1}), (NegativePrompt, {}), (PnPInversion, {}),
    ],
)  # fmt: skip
def test_any_grid_prediction_and_shape(tiny_model, kind, settings, spacing, prediction, monkeypatch):
    """With an unchanged prompt the edit is the reconstruction (SDEdit has none; PnP inversion corrects the source
    branch alone, which is then the input), and all timesteps are visited."""
    seen, predict = set(), tiny_model.predict_noise
    monkeypatch.setattr(tiny_model, "predict_noise", lambda x, t, c: seen.add(int(t)) or predict(x, t, c))
    monkeypatch.setattr(tiny_model, "prediction", prediction)
    monkeypatch.setattr(tiny_model, "schedule", NoiseSchedule())
    image = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(4)) * 2 - 1
    sampler = Sampler("ddpm" if kind in (SDEdit, DDPMInversion) else "ddim", 4, spacing)
    result = kind(sampler, **settings).edit(tiny_model, EditTask(image, "a red cat", "a red cat"))
    assert seen == set(tiny_model.schedule.trajectory(4, spacing).timesteps.tolist())
    assert result.tensors["edited_latents"].shape == (1, 4, 8, 12) and result.edits[0].image.shape == (3, 32, 48)
    if kind is PnPInversion:
        assert result.metrics["reconstruction_error"] == 0
    elif kind is not SDEdit:
        close(result.edits[0].image, result.reconstruction)


@pytest.mark.parametrize(
    ("method", "cost", "more"),
    [
        (SDEdit(Sampler("ddpm", 10), guidance_scale=2.0), 14, 0),
        (DDIMInversion(Sampler(steps=4), guidance_scale=2.0), 4 + 8, 4),
        (DDPMInversion(Sampler("ddpm", 5)), 8 + 8, 0),
        (PnPInversion(Sampler(steps=4)), 4 + 16, 0),
        (DirectInversion(Sampler(steps=4)), 4 + 8, 0),
        (Imagic(Sampler(steps=4), embedding_steps=1, tuning_steps=1), 2 + 4 + 8, 8),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_an_edit_costs_and_what_the_reconstruction_takes_beside_it(tiny_model, task, method, cost, more):
    class Counting(Reporter):
        evaluations = {}

        @contextmanager
        def stage(self, name):
            before = tiny_model.evaluations
            yield
            self.evaluations[name] = tiny_model.evaluations - before

    before = tiny_model.evaluations
    method.edit(tiny_model, task, Counting())
    assert Counting.evaluations["reconstruction"] == more
    assert sum(Counting.evaluations.values()) == tiny_model.evaluations - before == cost + more


# SDEdit.


def test_sdedit_is_the_end_of_sampling_from_the_noised_image(tiny_model, task):
    result = SDEdit(Sampler(steps=10), strength=0.3, guidance_scale=2.0).edit(tiny_model, task, seed=5)
    trajectory = tiny_model.schedule.trajectory(10)
    z, eps = tiny_model.encode_image(task.image), torch.randn(1, 4, 8, 8, generator=generator(5, "start", 0))
    a = trajectory.alpha_bars[7]
    x = a.sqrt().float() * z + (1 - a).sqrt().float() * eps
    denoise = guided(tiny_model, tiny_model.encode_text([task.prompt]), tiny_model.encode_text([""]), 2.0)
    for i in (7, 8, 9):
        eps = denoise(x, int(trajectory.timesteps[i]))
        x = ddim.step(x, eps, trajectory.alpha_bars[i], trajectory.alpha_bars[i + 1])
    close(result.edits[0].image, decoded(tiny_model, x))


def test_sdedit_keeps_less_the_more_it_noises(tiny_model, task):
    kept = [
        SDEdit(Sampler("ddpm", 10), strength=s).edit(tiny_model, task).edits[0].metrics["edit_source_cosine"]
        for s in (0.0, 0.3, 1.0)
    ]
    assert kept == sorted(kept, reverse=True) and kept[0] > 0.99 and kept[-1] < 0.9


def test_sdedit_walks_in_more_than_half_precision(task):
    """The network's steps in bfloat16, at the very latents that are summed up in float64."""
    model = randomised(models.build(TINY, seed=0)).to(torch.bfloat16)
    half = EditTask(task.image.bfloat16(), task.prompt)
    result = SDEdit(Sampler(steps=4), strength=1.0, guidance_scale=1.0).edit(model, half, seed=5)
    trajectory, z = model.schedule.trajectory(4), model.encode_image(half.image).double()
    x = model.schedule.add_noise(z, noise_like(z, generator(5, "start", 0)), int(trajectory.timesteps[0]))
    x = ddim.sample(guided(model, model.encode_text([task.prompt])), x, trajectory)
    assert torch.equal(result.tensors["edited_latents"], x.float())


@pytest.mark.parametrize("kind", [SDEdit, DDPMInversion])
def test_samples_differ_and_seeds_repeat_them(tiny_model, task, kind):
    method = kind(Sampler("ddpm", 4), num_samples=2)
    first, again, other = (method.edit(tiny_model, task, seed=seed) for seed in (0, 0, 1))
    images = [torch.stack([edit.image for edit in result.edits]) for result in (first, again, other)]
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0][0], images[0][1])
    assert not torch.equal(images[0], images[2]) and [e.settings["sample"] for e in first.edits] == [0, 1]
    assert torch.equal(kind(Sampler("ddpm", 4)).edit(tiny_model, task).edits[0].image, images[0][0])


# DDIM inversion.


def test_ddim_inversion_is_up_under_one_prompt_and_down_under_the_other(tiny_model, task):
    method = DDIMInversion(Sampler(steps=4), guidance_scale=3.0, inversion_scale=0.5)
    result, trajectory = method.edit(tiny_model, task), tiny_model.schedule.trajectory(4)
    source, target, null = (tiny_model.encode_text([text]) for text in (task.source_prompt, task.prompt, ""))
    z = tiny_model.encode_image(task.image)
    up = ddim.invert(guided(tiny_model, source, null, 0.5), z, trajectory)
    close(result.tensors["inverted_latent"], up)
    close(result.tensors["edited_latents"], ddim.sample(guided(tiny_model, target, null, 3.0), up, trajectory))
    down = ddim.sample(guided(tiny_model, source, null, 0.5), up, trajectory)
    close(result.reconstruction, decoded(tiny_model, down))
    assert result.metrics["reconstruction_error"] == pytest.approx(float((down - z).square().mean().sqrt()), rel=1e-3)
    nothing = method.edit(tiny_model, replace(task, source_prompt=""))
    close(nothing.tensors["inverted_latent"], ddim.invert(guided(tiny_model, null), z, trajectory))


def test_ddim_inversion_returns_where_nothing_changes_and_the_inversion_is_exact(tiny_model, task):
    same = replace(task, prompt=task.source_prompt)
    errors = []
    for n in (0, 8):
        result = DDIMInversion(Sampler(steps=12), guidance_scale=1.0, fixed_point_steps=n).edit(tiny_model, same)
        close(result.edits[0].image, result.reconstruction)
        errors.append(result.metrics["reconstruction_error"])
    assert errors[1] < 3e-3 and errors[1] < errors[0] / 10


@pytest.mark.parametrize("sampler", [Sampler("ddpm"), Sampler(eta=0.5)])
def test_ddim_inversion_takes_the_path_that_goes_both_ways(sampler):
    with pytest.raises(InputError, match=r"sampler\.kind=ddim and sampler\.eta=0"):
        DDIMInversion(sampler)


# DDPM inversion.


def test_a_sampler_without_noise_has_none_to_find():
    with pytest.raises(InputError, match=r"sampler\.eta is 0: .* sampler=ddpm or sampler\.eta=1"):
        DDPMInversion(Sampler())


@pytest.mark.parametrize("sampler", KINDS)
@pytest.mark.parametrize(("end", "skip"), [("first", 0.0), ("one", 0.36), ("one", 1.0)])
def test_an_unchanged_prompt_returns_the_inputs_latent(tiny_model, task, sampler, end, skip, monkeypatch):
    monkeypatch.setattr(tiny_model, "schedule", NoiseSchedule(kind="cosine", final_alpha_bar=end))
    method = DDPMInversion(sampler, skip, guidance_scale=4.0, source_guidance_scale=4.0, num_samples=2)
    result = method.edit(tiny_model, replace(task, prompt=task.source_prompt))
    z = result.tensors["source_latent"]
    close(result.tensors["edited_latents"], z.expand(2, -1, -1, -1), 1e-6)
    assert (method.edit(tiny_model, task).tensors["edited_latents"] - z).abs().max() > 1e-5


def test_it_returns_in_half_precision_too(task):
    model = randomised(models.build(TINY, seed=0)).to(torch.bfloat16)
    half = EditTask(task.image.bfloat16(), task.source_prompt, task.source_prompt)
    result = DDPMInversion(Sampler("ddpm", 10)).edit(model, half)
    assert torch.equal(result.tensors["edited_latents"], result.tensors["source_latent"])
    assert torch.equal(result.edits[0].image, result.reconstruction)


def test_noise_maps_lead_along_a_path_of_independent_noise(tiny_model, task):
    """The maps written out: z_t = (x_{t-1} - mu_t(x_t)) / sigma_t, with DDPM's posterior mean and variance."""
    result = DDPMInversion(Sampler("ddpm", 4), 0.25, 2.0, 1.5).edit(tiny_model, task, seed=3)
    trajectory, z_0 = tiny_model.schedule.trajectory(4), tiny_model.encode_image(task.image).double()
    source, target, null = (tiny_model.encode_text([text]) for text in (task.source_prompt, task.prompt, ""))
    eps = generator(3, "path", 0)
    alpha_bars = trajectory.alpha_bars[1:]
    path = [a.sqrt() * z_0 + (1 - a).sqrt() * noise_like(z_0, eps) for a in alpha_bars[:-1]] + [z_0]

    def mean_and_sigma(prompt, w, x, i):
        a, b = alpha_bars[i], alpha_bars[i + 1]
        predicted = guided(tiny_model, prompt, null, w)(x.float(), int(trajectory.timesteps[i + 1])).double()
        x_0 = (x - (1 - a).sqrt() * predicted) / a.sqrt()
        beta = 1 - a / b
        mean = (b.sqrt() * beta * x_0 + (a / b).sqrt() * (1 - b) * x) / (1 - a)  # Ho et al., eq. 7
        return mean, ((1 - b) / (1 - a) * beta).sqrt()

    x = path[0]
    for i in range(3):
        mean, sigma = mean_and_sigma(source, 1.5, path[i], i)
        z = (path[i + 1] - mean) / sigma
        mean, sigma = mean_and_sigma(target, 2.0, x, i)
        x = mean + sigma * z
    close(result.tensors["edited_latents"], x.float())


def test_it_keeps_more_the_more_it_skips(tiny_model, task):
    kept = [
        DDPMInversion(Sampler("ddpm", 10), skip, 5.0).edit(tiny_model, task).edits[0].metrics["edit_source_cosine"]
        for skip in (0.0, 0.5, 0.9)
    ]
    assert kept[0] < kept[1] < kept[2]


# The settings.

PUBLISHED = {  # with Stable Diffusion
    "sdedit": (50, {"strength": 0.75, "guidance_scale": 5.0}),
    "ddim_inversion": (50, {"guidance_scale": 7.5, "inversion_scale": 1.0}),
    "ddpm_inversion": (100, {"skip": 0.36, "guidance_scale": 15.0, "source_guidance_scale": 3.5}),
    "prompt_to_prompt": (50, {"guidance_scale": 7.5, "cross_replace": 0.8, "self_replace": 0.5}),
    "null_text": (50, {"guidance_scale": 7.5, "inner_steps": 10, "null_lr": 1e-2, "cross_replace": 0.8}),
    "negative_prompt": (50, {"guidance_scale": 7.5, "cross_replace": 0.8, "self_replace": 0.5}),
    "pnp_inversion": (50, {"guidance_scale": 7.5, "words": "refine", "cross_replace": 0.4, "self_replace": 0.6}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_defaults_are_the_configs_and_stable_diffusion_has_the_published(name):
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        own = instantiate(hydra.compose("edit", [f"method={name}"]).method)
        published = instantiate(hydra.compose("edit", [f"method={name}", "model=sd21"]).method)
    assert own == type(own)(own.sampler)
    assert own.sampler == Sampler("ddpm" if name in ("sdedit", "ddpm_inversion") else "ddim", 50)
    steps, settings = PUBLISHED[name]
    assert published == type(own)(replace(own.sampler, steps=steps), **settings)
