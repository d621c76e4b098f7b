"""Direct Inversion, on a tiny random model: the exact cases, the start's cosine and moments, each option's effect."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import models
from errors import InputError
from methods.base import Run, cosine
from methods.direct_inversion import DirectInversion
from methods.direct_inversion_extras import other_grid, with_cosine
from samplers import Sampler, ddim, guided
from tests.conftest import TINY, WITHOUT_CLIP, latents, normal, randomised


def method(steps=4, eta=0.0, **kwargs):
    return DirectInversion(Sampler(steps=steps, eta=eta), **kwargs)


@pytest.mark.parametrize("dtype, fraction", [(torch.float32, 1.0), (torch.bfloat16, 0.3)], ids=str)
@pytest.mark.parametrize("blend", ["noise", "latent"])
def test_strength_0_is_the_reconstruction_for_any_network(task, edit, dtype, blend, fraction):
    model = randomised(models.build(TINY, seed=0)).to(dtype)
    results = edit(method(edit_strength=0, blend=blend, blend_fraction=fraction), model, task)
    z = model.encode_image(task.image).double()
    for latent in (latents(results), results[1][0]):
        torch.testing.assert_close(latent, z, atol=1e-9, rtol=0)
    assert results[2].metrics["replay_error"] < 1e-9


@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("blend", ["noise", "latent"])
def test_the_walk_written_out_by_hand(tiny_model, task, edit, blend, strength):
    """Blending over half of 4 steps; with strength 1, plain guided sampling from the inverted latent."""
    settings = {"edit_strength": strength, "blend": blend, "blend_fraction": 0.5, "guidance_scale": 2.0}
    results = edit(method(**settings), tiny_model, task)
    alpha_bars = tiny_model.schedule.trajectory(4).levels.tolist()
    ts = tiny_model.schedule.trajectory(4).timesteps.tolist()
    null, target = tiny_model.encode_text([""]), tiny_model.encode_text([task.prompt])

    def move(x, eps, a, b):
        x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        return math.sqrt(b) * x0 + math.sqrt(1 - b) * eps

    path, recorded = [tiny_model.encode_image(task.image).double()], []
    for i in reversed(range(4)):
        recorded.insert(0, tiny_model.predict(path[0], ts[i], null))
        path.insert(0, move(path[0], recorded[0], alpha_bars[i + 1], alpha_bars[i]))
    z = path[0]
    for i in range(4):
        lam = 1 - strength if i < 2 else 0.0
        eps_null, eps_target = tiny_model.predict(z, ts[i], null), tiny_model.predict(z, ts[i], target)
        eps = eps_null + 2.0 * (eps_target - eps_null)
        eps = (1 - lam) * eps + lam * (recorded[i] if blend == "noise" else path[0])
        z = move(z, eps, alpha_bars[i], alpha_bars[i + 1])
    torch.testing.assert_close(results[2].tensors["inverted_latent"], path[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(latents(results), z, atol=1e-4, rtol=0)
    metrics = results[2].metrics
    assert metrics["inverted_source_cosine"] == pytest.approx(cosine(path[0], path[-1]), abs=1e-5)
    assert metrics["inverted_std"] == pytest.approx(float(path[0].std()), rel=1e-4)


@pytest.mark.parametrize("blend", ["noise", "latent"])
def test_the_inversion_may_take_other_steps(tiny_model, task, edit, blend):
    """6 up and 4 down, walked here step by step: the noise recorded nearest to each timestep stands in for its own."""
    kwargs, schedule = {"edit_strength": 0.3, "blend": blend, "guidance_scale": 2.0}, tiny_model.schedule
    edited, _, run = edit(method(inversion_steps=6, **kwargs), tiny_model, task)
    down, z = schedule.trajectory(4), tiny_model.encode_image(task.image).double()
    up = other_grid(schedule, down, 6)
    assert len(up) == 6 and up.timesteps[0] == down.timesteps[0] and (up.levels.diff() > 0).all()
    recording = ddim.invert(guided(tiny_model, ""), z, up)
    denoise, z = guided(tiny_model, task.prompt, 2.0), recording.latent
    for i, t in enumerate(down.timesteps.tolist()):
        nearest = int((up.timesteps - t).abs().argmin())
        held = recording.eps[nearest] if blend == "noise" else recording.latent
        z = down.step(z, 0.3 * denoise(z, t) + 0.7 * held, i, i + 1)
    torch.testing.assert_close(edited[0][1], z, atol=1e-5, rtol=0)
    assert run.metrics["replay_error"] > 1e-3


@settings(max_examples=50, deadline=None)
@given(s=st.floats(0, 1), seed=st.integers(0, 2**31), mean=st.floats(-0.7, 0.7), scale=st.floats(0.1, 3))
def test_the_cosine_is_exact_and_mean_and_variance_stay(s, seed, mean, scale):
    g = torch.Generator().manual_seed(seed)
    z = scale * (torch.randn(1, 4, 8, 8, generator=g).double() + mean)
    start = with_cosine(z, torch.randn(1, 4, 8, 8, generator=g).double(), s)
    assert cosine(start, z) == pytest.approx(s, abs=1e-9)
    assert float(start.mean()) == pytest.approx(float(z.mean()), abs=1e-9)
    assert float(start.var()) == pytest.approx(float(z.var()), rel=1e-9)


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [({"structural_similarity": s}, s) for s in (0, 0.6, 1)] + [({"diversity": 0.6}, 0.8), ({"diversity": 1}, 0)],
)
def test_similarity_and_diversity_set_the_cosine_of_the_start(tiny_model, task, edit, kwargs, expected):
    sampler = Sampler(steps=2, eta=0.5)  # whose noise tells samples apart where the starts do not
    results = edit(DirectInversion(sampler, num_samples=3, **kwargs), tiny_model, task)
    starts, inverted = results[2].tensors["start_latents"], results[2].tensors["inverted_latent"]
    assert [cosine(start, inverted) for start in starts] == pytest.approx([expected] * 3, abs=1e-6)
    assert results[2].metrics["start_inverted_cosine"] == pytest.approx(expected, abs=1e-6)
    assert starts.std(dim=(1, 2, 3)).tolist() == pytest.approx([float(inverted.std())] * 3, rel=1e-4)
    assert torch.equal(starts[0], starts[1]) == (expected == 1)
    assert [s["sample"] for s, _, _ in results[0]] == [0, 1, 2] and not torch.equal(*latents(results)[:2])
    one = edit(DirectInversion(sampler, **kwargs), tiny_model, task)
    assert torch.equal(latents(one), results[0][0][1])  # a sample does not depend on how many there are


def test_the_linear_and_the_gaussian_mix():
    z_x = 0.7 * normal(1, 4, 8, 8) + 0.2  # far from standard normal

    def draws(count, mix, alpha, beta):
        start = method(mix=mix, alpha=alpha, beta=beta).start_latent
        return torch.cat([start(z_x, Run(i).noise("start", 0)) for i in range(count)])

    starts = draws(1, "linear", 0.8, 0.6)
    z_t = torch.randn(1, 4, 8, 8, generator=Run(0).noise("start", 0)).double()
    torch.testing.assert_close(starts, 0.8 * 0.6 * z_x + 0.2 * z_t)
    a, b, count = 0.7, 0.4, 4000
    starts = draws(count, "gaussian", a, b)
    # over z_t and the draw: mean a b z_x; variance (1-a)^2 from z_t in the mean, and a(1-b) var(z_x) + (1-a) var(z_t)
    variance = (1 - a) ** 2 + a * (1 - b) * float(z_x.var()) + (1 - a)
    assert float((starts.mean(dim=0) - a * b * z_x[0]).abs().max()) < 5 * math.sqrt(variance / count)
    assert float(starts.var(dim=0).mean()) == pytest.approx(variance, rel=0.01)
    for mix in ("linear", "gaussian"):
        torch.testing.assert_close(draws(1, mix, 1.0, 1.0), z_x)


def test_semantic_coherence_raises_clips_agreement(tiny_model, task, edit):
    plain = latents(edit(method(), tiny_model, task))
    kwargs = {"coherence_steps": 8, "coherence_lr": 0.1}
    near, steered = (edit(method(semantic_coherence=w, **kwargs), tiny_model, task) for w in (0.05, 5.0))
    seen = [tiny_model.clip.image_features(tiny_model.decode_latents(z)) for z in (plain, latents(steered))]
    before, after = (cosine(features, tiny_model.clip.text_features([task.prompt])) for features in seen)
    assert after > before + 0.05
    distance = [float((latents(r) - plain).norm()) for r in (near, steered)]
    assert 0 < distance[0] < distance[1]  # a small weight stays near
    with pytest.raises(InputError, match="semantic_coherence"):
        edit(method(semantic_coherence=1.0), models.build(WITHOUT_CLIP, seed=0), task)
