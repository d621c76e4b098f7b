"""Direct Inversion, on a tiny random model: the exact cases, the mixes' moments, and each option's effect."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import TINY, randomised
from hypothesis import given, settings
from hypothesis import strategies as st

import models
from data.tasks import EditTask
from errors import InputError
from methods import direct_inversion
from methods.base import Reporter, cosine, generator
from methods.direct_inversion import DirectInversion, with_cosine
from samplers import NoiseSchedule, Sampler, ddim, guided


@pytest.fixture(scope="module")
def task():
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return EditTask(image, "a red cat")


def method(steps=4, eta=0.0, **kwargs):
    return DirectInversion(Sampler(steps=steps, eta=eta), **kwargs)


def images(result):
    return torch.stack([edit.image for edit in result.edits])


def autoencoded(model, task):
    return model.decode_latents(model.encode_image(task.image)).clamp(-1, 1)


@pytest.mark.parametrize("blend", ["noise", "latent", "path"])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_strength_0_is_the_reconstruction_whatever_the_network(tiny_model, task, blend, fraction):
    result = method(edit_strength=0, blend=blend, blend_fraction=fraction).edit(tiny_model, task)
    expected = autoencoded(tiny_model, task)
    torch.testing.assert_close(images(result), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(result.reconstruction[None], expected, atol=1e-5, rtol=0)
    assert result.metrics["replay_error"] < 1e-9
    assert result.metrics["edit_source_cosine"] == pytest.approx(1)


def test_strength_0_is_exact_in_half_precision_too(task):
    model = randomised(models.build(TINY, seed=0)).to(torch.bfloat16)
    half = EditTask(task.image.bfloat16(), task.prompt)
    result = method(edit_strength=0).edit(model, half)
    assert torch.equal(images(result), autoencoded(model, half).float())


@pytest.mark.parametrize("blend", ["noise", "latent", "path"])
def test_strength_1_is_plain_guided_sampling_from_the_inverted_latent(tiny_model, task, blend):
    result = method(edit_strength=1, blend=blend, guidance_scale=2.0).edit(tiny_model, task)
    trajectory = tiny_model.schedule.trajectory(4)
    null, target = tiny_model.encode_text([""]), tiny_model.encode_text([task.prompt])
    start = ddim.invert(guided(tiny_model, null), tiny_model.encode_image(task.image), trajectory)
    z = ddim.sample(guided(tiny_model, target, null, 2.0), start, trajectory)
    torch.testing.assert_close(result.tensors["inverted_latent"], start, atol=1e-4, rtol=0)
    torch.testing.assert_close(result.tensors["edited_latents"], z, atol=1e-4, rtol=0)


@pytest.mark.parametrize("blend", ["noise", "latent", "path"])
def test_blending_follows_its_equation(tiny_model, task, blend):
    """Strength 0.3 over half of 4 steps, walked here step by step."""
    result = method(edit_strength=0.3, blend=blend, blend_fraction=0.5, guidance_scale=2.0).edit(tiny_model, task)
    trajectory, x0 = tiny_model.schedule.trajectory(4), tiny_model.encode_image(task.image)
    null, target = tiny_model.encode_text([""]), tiny_model.encode_text([task.prompt])
    recording = ddim.record(guided(tiny_model, null), x0, trajectory)
    denoise, z = guided(tiny_model, target, null, 2.0), recording.latent
    for i in range(4):
        lam = 0.7 if i < 2 else 0.0
        eps = denoise(z, int(trajectory.timesteps[i]))
        if blend != "path":
            eps = (1 - lam) * eps + lam * (recording.eps[i] if blend == "noise" else recording.latent)
        z = ddim.step(z, eps, trajectory.alpha_bars[i], trajectory.alpha_bars[i + 1])
        if blend == "path":
            z = (1 - lam) * z + lam * recording.latents[i + 1]
    torch.testing.assert_close(result.tensors["edited_latents"], z, atol=1e-4, rtol=0)


@pytest.mark.parametrize("blend", ["noise", "latent"])
def test_the_inversion_may_take_other_steps(tiny_model, task, blend):
    """6 up and 4 down, walked here step by step: the noise recorded nearest to each timestep stands in for its own."""
    settings = {"edit_strength": 0.3, "blend": blend, "guidance_scale": 2.0}
    result = method(inversion_steps=6, **settings).edit(tiny_model, task)
    down = tiny_model.schedule.trajectory(4)
    up = direct_inversion.other_grid(tiny_model.schedule, down, 6)
    null, target = tiny_model.encode_text([""]), tiny_model.encode_text([task.prompt])
    recording = ddim.record(guided(tiny_model, null), tiny_model.encode_image(task.image), up)
    denoise, z = guided(tiny_model, target, null, 2.0), recording.latent
    for i, t in enumerate(down.timesteps.tolist()):
        nearest = min(range(6), key=lambda j: abs(int(up.timesteps[j]) - t))
        held = recording.eps[nearest] if blend == "noise" else recording.latent
        eps = 0.3 * denoise(z, t) + 0.7 * held
        z = ddim.step(z, eps, down.alpha_bars[i], down.alpha_bars[i + 1])
    torch.testing.assert_close(result.tensors["edited_latents"], z, atol=1e-4, rtol=0)
    assert result.metrics["replay_error"] > 1e-3
    same = method(inversion_steps=4, **settings).edit(tiny_model, task)
    assert torch.equal(images(same), images(method(**settings).edit(tiny_model, task)))


@given(st.integers(1, 40), st.integers(1, 200), st.sampled_from(("leading", "trailing", "linspace")))
@settings(max_examples=40, deadline=None)
def test_another_grid_joins_the_same_two_noise_levels(steps, others, spacing):
    schedule = NoiseSchedule()
    trajectory = schedule.trajectory(steps, spacing)
    if others > int(trajectory.timesteps[0]) + 1:
        with pytest.raises(InputError, match=r"method\.inversion_steps is"):
            direct_inversion.other_grid(schedule, trajectory, others)
        return
    grid = direct_inversion.other_grid(schedule, trajectory, others)
    assert len(grid) == others and (grid.timesteps.diff() < 0).all() and grid.timesteps[-1] >= 0
    assert grid.timesteps[0] == trajectory.timesteps[0] and grid.alpha_bars[-1] == trajectory.alpha_bars[-1]
    assert torch.equal(grid.alpha_bars[:-1], schedule.alpha_bars[grid.timesteps])


def test_inversion_steps_out_of_range_are_refused():
    with pytest.raises(InputError, match=r"method\.inversion_steps is 6: method\.blend=path"):
        method(inversion_steps=6, blend="path")
    with pytest.raises(InputError, match=r"method\.inversion_steps is 0"):
        method(inversion_steps=0)


def test_more_strength_leads_further_from_the_source(tiny_model, task):
    similarity = []
    for strength in (0.0, 0.25, 0.5, 1.0):
        result = method(edit_strength=strength, guidance_scale=4.0).edit(tiny_model, task)
        similarity.append(result.edits[0].metrics["edit_source_cosine"])
    assert similarity == sorted(similarity, reverse=True) and similarity[-1] < similarity[0] - 0.01


@settings(max_examples=50, deadline=None)
@given(
    s=st.floats(0, 1),
    seed=st.integers(0, 2**31),
    mean=st.floats(-0.7, 0.7),
    scale=st.floats(0.1, 3),
)
def test_the_cosine_is_exact_and_mean_and_variance_stay(s, seed, mean, scale):
    g = torch.Generator().manual_seed(seed)
    z = scale * (torch.randn(1, 4, 8, 8, generator=g) + mean)
    start = with_cosine(z, torch.randn(1, 4, 8, 8, generator=g), s)
    assert start.dtype == z.dtype and start.shape == z.shape
    assert cosine(start, z) == pytest.approx(s, abs=1e-5)
    assert float(start.norm()) == pytest.approx(float(z.norm()), rel=1e-5)
    assert float(start.mean()) == pytest.approx(float(z.mean()), abs=1e-5 * scale)
    assert float(start.var()) == pytest.approx(float(z.var()), rel=1e-4)


def test_cosine_and_norm_hold_where_the_mean_cannot():
    g = torch.Generator().manual_seed(0)
    for z in (torch.randn(1, 4, 8, 8, generator=g) + 5, torch.ones(1, 4, 8, 8), -torch.ones(1, 4, 8, 8)):
        for s in (0.0, 0.5, 1.0):
            start = with_cosine(z, torch.randn(1, 4, 8, 8, generator=g), s)
            assert cosine(start, z) == pytest.approx(s, abs=1e-5)
            assert float(start.norm()) == pytest.approx(float(z.norm()), rel=1e-5)


@pytest.mark.parametrize("s", [0.0, 0.6, 1.0])
def test_structural_similarity_is_the_cosine_of_the_start(tiny_model, task, s):
    result = method(structural_similarity=s, num_samples=2, diversity=0.0 if s < 1 else 1e-9).edit(tiny_model, task)
    for edit in result.edits:
        assert edit.metrics["start_inverted_cosine"] == pytest.approx(s, abs=1e-6)
    starts, inverted = result.tensors["start_latents"], result.tensors["inverted_latent"]
    assert torch.equal(starts[0], starts[1]) == (s == 1)
    assert starts.std(dim=(1, 2, 3)).tolist() == pytest.approx([float(inverted.std())] * 2, rel=1e-4)


def draws(count, **kwargs):
    """Start latents, (count, ...), for one inverted latent that is far from standard normal."""
    z_x = 0.7 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.2
    rule = method(**kwargs)
    return z_x, torch.cat([rule.start_latent(z_x, generator(i, "start", 0)) for i in range(count)])


def test_linear_mix_is_its_formula():
    a, b = 0.8, 0.6
    z_x, starts = draws(1, mix="linear", alpha=a, beta=b)
    z_t = torch.randn(1, 4, 8, 8, generator=generator(0, "start", 0)).double()
    torch.testing.assert_close(starts, a * b * z_x + (1 - a) * z_t)
    assert torch.equal(draws(1, mix="linear", alpha=1.0, beta=1.0)[1], z_x)


def test_gaussian_mix_has_its_moments():
    a, b, count = 0.7, 0.4, 4000
    z_x, starts = draws(count, mix="gaussian", alpha=a, beta=b)
    # over z_t and the draw: mean a b z_x; variance (1-a)^2 from z_t in the mean, and a(1-b) var(z_x) + (1-a) var(z_t)
    variance = (1 - a) ** 2 + a * (1 - b) * float(z_x.var()) + (1 - a)
    error = (starts.mean(dim=0) - a * b * z_x[0]).flatten()
    assert float(error.abs().max()) < 5 * math.sqrt(variance / count)
    assert float(starts.var(dim=0).mean()) == pytest.approx(variance, rel=0.01)
    # given z_t, what is left is the draw alone
    z_t = torch.cat([torch.randn(1, 4, 8, 8, generator=generator(i, "start", 0)) for i in range(200)]).double()
    rest = starts[:200] - a * b * z_x - (1 - a) * z_t
    expected = a * (1 - b) * z_x.var() + (1 - a) * z_t.var(dim=(1, 2, 3)).mean()
    assert float(rest.var()) == pytest.approx(float(expected), rel=0.03)
    _, certain = draws(1, mix="gaussian", alpha=1.0, beta=1.0)
    torch.testing.assert_close(certain, z_x)


@pytest.mark.parametrize("d", [0.4, 1.0])
def test_diversity_tells_samples_apart_and_keeps_the_variance(tiny_model, task, d):
    result = method(diversity=d, num_samples=3).edit(tiny_model, task)
    starts, inverted = result.tensors["start_latents"], result.tensors["inverted_latent"]
    for edit in result.edits:
        assert edit.metrics["start_inverted_cosine"] == pytest.approx(math.sqrt(1 - d * d), abs=1e-6)
    assert starts.std(dim=(1, 2, 3)).tolist() == pytest.approx([float(inverted.std())] * 3, rel=1e-4)
    assert not torch.equal(images(result)[0], images(result)[1])
    assert [edit.settings["sample"] for edit in result.edits] == [0, 1, 2]
    first = method(diversity=d).edit(tiny_model, task)
    assert torch.equal(images(first)[0], images(result)[0])  # a sample does not depend on how many there are


def test_semantic_coherence_raises_clips_agreement(tiny_model, task):
    plain = method().edit(tiny_model, task)
    kwargs = {"coherence_steps": 8, "coherence_lr": 0.1}
    steered = method(semantic_coherence=5.0, **kwargs).edit(tiny_model, task)
    metrics = steered.edits[0].metrics
    text = tiny_model.clip.text_features([task.prompt])

    def agreement(result):
        return cosine(tiny_model.clip.image_features(images(result)), text)

    assert metrics["clip_cosine_after"] > metrics["clip_cosine_before"] + 0.05
    assert agreement(steered) > agreement(plain)
    near = method(semantic_coherence=0.05, **kwargs).edit(tiny_model, task)
    distance = [float((r.tensors["edited_latents"] - plain.tensors["edited_latents"]).norm()) for r in (near, steered)]
    assert 0 < distance[0] < distance[1]  # a small weight stays near
    none = method(semantic_coherence=5.0, coherence_steps=0).edit(tiny_model, task)
    assert torch.equal(images(none), images(plain))


def test_only_a_resampled_clip_relaxes_determinism(tiny_model, task, monkeypatch):
    """The gradient of the resampling has no deterministic kernel on CUDA; all others have, and are held to it."""
    modes = []
    real = direct_inversion.minimise

    def minimise(*args):
        modes.append(torch.get_deterministic_debug_mode())
        return real(*args)

    monkeypatch.setattr(direct_inversion, "minimise", minimise)
    torch.use_deterministic_algorithms(True)
    try:
        for image in (task.image, task.image[..., :16]):
            method(steps=2, semantic_coherence=1.0, coherence_steps=1).edit(tiny_model, replace(task, image=image))
            assert torch.get_deterministic_debug_mode() == 2
    finally:
        torch.use_deterministic_algorithms(False)
    assert modes == [2, 1]


def test_semantic_coherence_names_what_is_wrong(tiny_model, task):
    without = {name: part for name, part in TINY.items() if name != "vision"}
    with pytest.raises(InputError, match=r"method\.semantic_coherence"):
        method(semantic_coherence=1.0).edit(models.build(without, seed=0), task)
    with pytest.raises(InputError, match=r"stage 'coherence' at step \d+: lower method\.coherence_lr"):
        method(semantic_coherence=1.0, coherence_lr=1e30).edit(tiny_model, task)


def test_fixed_point_steps_make_the_inversion_consistent(tiny_model, task):
    """From an exactly inverted latent, sampling under the same prompt without recording or guidance comes back."""
    task = EditTask(task.image, "")
    error = []
    for k in (0, 6):
        result = method(edit_strength=1, guidance_scale=1.0, fixed_point_steps=k, steps=10).edit(tiny_model, task)
        error.append(float((result.tensors["edited_latents"] - result.tensors["source_latent"]).norm()))
    assert error[1] < 0.1 * error[0]


@pytest.mark.parametrize(
    "setting",
    [
        {"inversion_prompt": "a blue cat"},
        {"guidance_scale": 5.0},
        {"guidance_scale": 0.0},
        {"eta": 0.7},
        {"steps": 5},
        {"blend": "latent"},
        {"blend": "path"},
        {"blend_fraction": 0.5},
        {"mix": "linear"},
        {"mix": "gaussian"},
        {"mix": "gaussian", "alpha": 0.5},
        {"mix": "gaussian", "beta": 0.5},
        {"fixed_point_steps": 1},
    ],
    ids=str,
)
def test_every_setting_has_an_effect(tiny_model, task, setting):
    plain = method(**({"mix": setting["mix"]} if len(setting) == 2 else {})).edit(tiny_model, task)
    other = method(**setting).edit(tiny_model, task)
    assert not torch.equal(images(plain), images(other))


def test_seed_decides_and_nothing_else(tiny_model, task):
    noisy = method(diversity=0.5, eta=0.5)
    torch.manual_seed(1)
    first = noisy.edit(tiny_model, task, seed=1)
    torch.manual_seed(2)
    again, other = noisy.edit(tiny_model, task, seed=1), noisy.edit(tiny_model, task, seed=2)
    assert torch.equal(images(first), images(again)) and not torch.equal(images(first), images(other))


def test_the_model_comes_back_unchanged(task):
    model = randomised(models.build(TINY, seed=1)).requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    method(semantic_coherence=1.0, coherence_steps=2, diversity=0.1).edit(model, task)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_long_loops_show_their_progress(tiny_model, task):
    class Bars(Reporter):
        seen = []

        def progress(self, iterable, stage, total=None):
            items = list(iterable)
            self.seen.append((stage, total, len(items)))
            yield from items

    method(semantic_coherence=1.0, coherence_steps=2).edit(tiny_model, task, Bars())
    assert Bars.seen == [("inversion", 4, 4), ("editing", 4, 4), ("coherence", 2, 2)]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"edit_strength": 1.1}, "method.edit_strength is 1.1: it must be a number from 0 to 1"),
        ({"edit_strength": -0.1}, "method.edit_strength"),
        ({"blend_fraction": 2}, "method.blend_fraction"),
        ({"structural_similarity": -1}, "method.structural_similarity"),
        ({"structural_similarity": 0.5, "mix": "linear"}, "method.structural_similarity"),
        ({"alpha": 0.5}, "method.alpha is 0.5, which only method.mix=linear"),
        ({"beta": 0.5}, "method.beta is 0.5, which only method.mix=linear"),
        ({"inversion_prompt": None}, "method.inversion_prompt is None: it must be a text"),
        ({"alpha": 1.5}, "method.alpha"),
        ({"beta": -0.5}, "method.beta"),
        ({"diversity": 1.5}, "method.diversity"),
        ({"semantic_coherence": -1}, "method.semantic_coherence"),
        ({"coherence_lr": -1}, "method.coherence_lr"),
        ({"coherence_steps": -1}, "method.coherence_steps"),
        ({"fixed_point_steps": 0.5}, "method.fixed_point_steps"),
        ({"num_samples": 0}, "method.num_samples is 0: it must be a whole number, 1 or more"),
        ({"guidance_scale": "high"}, "method.guidance_scale"),
        ({"blend": "pixels"}, "method.blend is pixels: choose one of noise, latent, path"),
        ({"mix": "spherical"}, "method.mix is spherical: choose one of cosine, linear, gaussian"),
        ({"sampler": Sampler("ddpm")}, "sampler.kind is ddpm"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(setting, message):
    with pytest.raises(InputError) as error:
        DirectInversion(**{"sampler": Sampler(), **setting})
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_samples_that_would_all_be_one_picture_are_refused():
    with pytest.raises(InputError, match=r"method\.num_samples is 2, and all would be one picture"):
        method(num_samples=2)
    with pytest.raises(InputError, match="all would be one picture"):
        method(num_samples=2, mix="gaussian", alpha=1.0, beta=1.0)
    method(num_samples=2, mix="gaussian", alpha=1.0, beta=0.5)
    method(num_samples=2, diversity=0.1)


def test_a_list_is_refused_where_one_number_is_meant():
    with pytest.raises(InputError, match=r"method\.edit_strength is \[0\.3, 0\.6\]: it must be a number from 0 to 1$"):
        method(edit_strength=[0.3, 0.6])
