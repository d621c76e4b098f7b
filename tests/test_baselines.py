"""Laws that hold for every method, and SDEdit, DDIM inversion and DDPM inversion written out by hand."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import models
from data.tasks import EditTask
from errors import InputError
from methods.base import Run
from methods.ddim_inversion import DDIMInversion
from methods.ddpm_inversion import DDPMInversion
from methods.direct_inversion import DirectInversion
from methods.imagic import Imagic
from methods.inversion import Inversion, NegativePrompt, PnP
from methods.masactrl import MasaCtrl
from methods.null_text import NullText
from methods.plug_and_play import PlugAndPlay
from methods.prompt_to_prompt import PromptToPrompt
from methods.sdedit import SDEdit
from samplers import NoiseSchedule, Sampler, ddim, guided, noise_like
from tests.conftest import TINY, close, randomised

DDIM, DDPM = Sampler(4), Sampler(4, eta=1.0)
METHODS = {
    "sdedit": SDEdit(DDPM, strength=1.0),
    "ddim_inversion": DDIMInversion(DDIM, inversion_scale=2.0),
    "ddpm_inversion": DDPMInversion(DDPM, skip=0.0, source_guidance_scale=1.5),
    "prompt_to_prompt": PromptToPrompt(DDIM, Inversion()),
    "null_text": PromptToPrompt(DDIM, NullText(inner_steps=1)),
    "negative_prompt": PromptToPrompt(DDIM, NegativePrompt()),
    "pnp_inversion": PromptToPrompt(DDIM, PnP()),
    "masactrl": MasaCtrl(DDIM, PnP(), start_step=1, start_layer=1),
    "plug_and_play": PlugAndPlay(DDIM, NullText(inner_steps=1)),
    "direct_inversion": DirectInversion(DDIM, diversity=0.5, semantic_coherence=1.0, coherence_steps=2),
    "imagic": Imagic(DDIM, embedding_steps=1, tuning_steps=1),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_bits_and_the_model_is_handed_back(tiny_model, task, edit, name):
    before, x = tiny_model.fingerprint, torch.randn(1, 4, 8, 8)
    eps = guided(tiny_model, "a cat")(x, 7)
    first, again, other = (edit(METHODS[name], tiny_model, task, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first[0][1], again[0][1]) and torch.equal(first[0][2], again[0][2])
    noisy = name in ("sdedit", "ddpm_inversion", "direct_inversion", "imagic")
    assert first[0][1].dtype == torch.float64 and torch.equal(first[0][1], other[0][1]) != noisy
    assert tiny_model.fingerprint == before and not any(p.requires_grad for p in tiny_model.parameters())
    assert torch.equal(guided(tiny_model, "a cat")(x, 7), eps)


@pytest.mark.parametrize("prediction, spacing", [("epsilon", "trailing"), ("v", "leading")])
@pytest.mark.parametrize("name", METHODS)
def test_any_grid_prediction_and_shape(tiny_model, edit, name, spacing, prediction, monkeypatch):
    """All timesteps are visited, and where source and target branch are alike, an unchanged prompt reconstructs."""
    seen, predict = set(), tiny_model.predict
    visit = lambda t: seen.update(torch.as_tensor(t).reshape(-1).tolist())
    monkeypatch.setattr(tiny_model, "predict", lambda x, t, c: visit(t) or predict(x, t, c))
    monkeypatch.setattr(tiny_model, "prediction", prediction)
    monkeypatch.setattr(tiny_model, "schedule", NoiseSchedule())
    image = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(4)) * 2 - 1
    method = replace(METHODS[name], sampler=replace(METHODS[name].sampler, spacing=spacing))
    edits, (again, _), _ = edit(method, tiny_model, EditTask(image, "a red cat", "a red cat"))
    assert seen >= set(tiny_model.schedule.trajectory(4, spacing).timesteps.tolist())
    ((_, latent, picture),) = edits
    assert latent.shape == (1, 4, 8, 12) and picture.shape == (3, 32, 48)
    if name in ("ddpm_inversion", "prompt_to_prompt", "null_text", "negative_prompt"):
        close(latent, again)


@pytest.mark.parametrize("name", METHODS)
def test_prompt_to_prompt_alone_needs_a_source_prompt(tiny_model, task, edit, name):
    needs = isinstance(METHODS[name], PromptToPrompt)
    with pytest.raises(InputError, match="source_prompt") if needs else nullcontext():
        edit(METHODS[name], tiny_model, replace(task, source_prompt=""))


@pytest.mark.parametrize("kind", [SDEdit, DDPMInversion])
def test_samples_differ_and_the_first_is_that_of_a_single_one(tiny_model, task, edit, kind):
    edits, _, _ = edit(kind(DDPM, num_samples=2), tiny_model, task)
    assert [settings["sample"] for settings, *_ in edits] == [0, 1] and not torch.equal(edits[0][1], edits[1][1])
    assert torch.equal(edit(kind(DDPM), tiny_model, task)[0][0][1], edits[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sdedit_is_the_end_of_sampling_from_the_noised_image(task, edit, dtype):
    """The latents are summed up in float64 in half precision too."""
    model = randomised(models.build(TINY, seed=0)).to(dtype)
    method = SDEdit(Sampler(steps=10), strength=0.3, guidance_scale=2.0)
    ((settings, latent, _),), (again, _), _ = edit(method, model, task, seed=5)
    trajectory, z = model.schedule.trajectory(10), model.encode_image(task.image).double()
    a, eps = trajectory.levels[7], torch.randn(1, 4, 8, 8, generator=Run(5).noise("start", 0)).double()
    x, denoise = a.sqrt() * z + (1 - a).sqrt() * eps, guided(model, task.prompt, 2.0)
    for i in (7, 8, 9):
        x = trajectory.step(x, denoise(x, int(trajectory.timesteps[i])), i, i + 1)
    close(latent, x, 1e-12)
    assert settings == {"strength": 0.3, "sample": 0} and torch.equal(again, z)


def test_ddim_inversion_is_up_under_one_prompt_and_down_under_the_other(tiny_model, task, edit):
    method = DDIMInversion(DDIM, guidance_scale=3.0, inversion_scale=0.5, fixed_point_steps=1)
    ((_, latent, _),), (again, _), run = edit(method, tiny_model, task)
    trajectory, z = tiny_model.schedule.trajectory(4), tiny_model.encode_image(task.image).double()
    as_source = guided(tiny_model, task.source_prompt, 0.5)
    up = ddim.invert(as_source, z, trajectory, fixed_point_steps=1).latent
    close(latent, ddim.sample(guided(tiny_model, task.prompt, 3.0), up, trajectory))
    close(again, ddim.sample(as_source, up, trajectory))
    assert run.metrics["reconstruction_error"] == pytest.approx(float((again - z).square().mean().sqrt()), rel=1e-3)


@pytest.mark.parametrize("sampler", [DDPM, replace(DDPM, eta=0.3)])
@pytest.mark.parametrize("end, skip", [("first", 0.0), ("one", 0.36), ("one", 1.0)])
def test_an_unchanged_prompt_returns_the_inputs_latent(tiny_model, task, edit, sampler, end, skip, monkeypatch):
    monkeypatch.setattr(tiny_model, "schedule", NoiseSchedule(kind="cosine", final_alpha_bar=end))
    method = DDPMInversion(sampler, skip, guidance_scale=4.0, source_guidance_scale=4.0)
    edits, (again, _), _ = edit(method, tiny_model, replace(task, prompt=task.source_prompt))
    close(edits[0][1], again, 1e-6)
    assert torch.equal(again, tiny_model.encode_image(task.image).double())
    assert (edit(method, tiny_model, task)[0][0][1] - again).abs().max() > 1e-5


def test_noise_maps_lead_along_a_path_of_independent_noise(tiny_model, task, edit):
    """The maps written out: z_t = (x_{t-1} - mu_t(x_t)) / sigma_t, with DDPM's posterior mean and variance."""
    ((_, latent, _),), _, _ = edit(DDPMInversion(DDPM, 0.25, 2.0, 1.5), tiny_model, task, seed=3)
    trajectory, z_0 = tiny_model.schedule.trajectory(4), tiny_model.encode_image(task.image).double()
    eps, alpha_bars = Run(3).noise("path", 0), trajectory.levels[1:]
    path = [a.sqrt() * z_0 + (1 - a).sqrt() * noise_like(z_0, eps) for a in alpha_bars[:-1]] + [z_0]

    def mean_and_sigma(prompt, w, x, i):
        a, b = alpha_bars[i], alpha_bars[i + 1]
        predicted = guided(tiny_model, prompt, w)(x, int(trajectory.timesteps[i + 1]))
        x_0 = (x - (1 - a).sqrt() * predicted) / a.sqrt()
        beta = 1 - a / b
        mean = (b.sqrt() * beta * x_0 + (a / b).sqrt() * (1 - b) * x) / (1 - a)  # Ho et al., eq. 7
        return mean, ((1 - b) / (1 - a) * beta).sqrt()

    x = path[0]
    for i in range(3):
        mean, sigma = mean_and_sigma(task.source_prompt, 1.5, path[i], i)
        z = (path[i + 1] - mean) / sigma
        mean, sigma = mean_and_sigma(task.prompt, 2.0, x, i)
        x = mean + sigma * z
    close(latent, x)


@pytest.mark.parametrize("kind", [SDEdit, DDIMInversion])
def test_guidance_leads_away_from_the_negative_prompt(tiny_model, task, edit, kind):
    """With the target as its own negative prompt guidance has no effect, whatever its scale."""
    strong, none, usual = (
        edit(kind(Sampler(steps=4), guidance_scale=scale), tiny_model, replace(task, negative_prompt=away))[0][0][1]
        for scale, away in ((5.0, task.prompt), (1.0, ""), (5.0, ""))
    )
    close(strong, none)
    assert not torch.allclose(usual, none)
