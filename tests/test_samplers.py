"""Schedules, grids, DDIM and DDPM against closed forms.

For Gaussian data x0 ~ N(mu, s^2) the optimal noise prediction is known, and linear in x:
    eps*(x, t) = sqrt(1 - ab) (x - sqrt(ab) mu) / V(ab),   V(ab) = ab s^2 + 1 - ab.
"""

import math
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from errors import InputError
from samplers import FlowSchedule, NoiseSchedule, Sampler, Trajectory, ddim, noise_like
from tests.conftest import normal

KINDS = ["scaled_linear", "linear", "cosine"]
SPACINGS = ["leading", "trailing"]
ENDS = ["first", "one"]
SCHEDULES = {(kind, end): NoiseSchedule(kind, final_alpha_bar=end) for kind in KINDS for end in ENDS}
SD = SCHEDULES["scaled_linear", "first"]

schedules = st.sampled_from(list(SCHEDULES.values()))
flows = st.builds(FlowSchedule, shift=st.floats(1, 6))
spacings, seeds = st.sampled_from(SPACINGS), st.integers(0, 99)
few = settings(max_examples=40, deadline=None)


def network(x: Tensor, t: int) -> Tensor:
    """An arbitrary smooth denoiser that mixes coordinates; nobody's optimal one. x: (B, 4)."""
    mix = torch.linspace(-1, 1, 16, dtype=x.dtype).reshape(4, 4)
    return torch.tanh(x @ mix + t / 500) + 0.3 * torch.sin(3 * x)


def test_alpha_bars_by_their_formulas() -> None:
    low, high, product = math.sqrt(0.00085), math.sqrt(0.012), 1.0
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    cosine = NoiseSchedule("cosine").alpha_bars
    for t in range(1000):
        product *= 1 - (low + (high - low) * t / 999) ** 2
        assert float(SD.alpha_bars[t]) == pytest.approx(product, rel=1e-12)
        if t < 999:  # only the last beta is clipped: telescoping leaves f
            assert float(cosine[t]) == pytest.approx(f[t + 1] / f[0], rel=1e-9)
    assert product == pytest.approx(0.00466, abs=5e-6)  # as published for Stable Diffusion
    assert float(cosine[-1] / cosine[-2]) == pytest.approx(0.001, rel=1e-9)


@given(schedule=schedules, t=st.lists(st.integers(0, 950), min_size=1, max_size=4), seed=st.integers(0, 999))
@few
def test_eps_v_and_x0_say_the_same_at_one_timestep_and_at_one_for_each_sample(schedule, t: list, seed: int) -> None:
    x0, eps = normal(2, len(t), 3, 4, 4, seed=seed)
    ab = schedule.alpha_bars[t].reshape(-1, 1, 1, 1)
    x, v = ab**0.5 * x0 + (1 - ab) ** 0.5 * eps, ab**0.5 * eps - (1 - ab) ** 0.5 * x0
    for of, ti in ((slice(None), torch.tensor(t)), (0, t[0])):
        torch.testing.assert_close(schedule.add_noise(x0[of], eps[of], ti), x[of])
        torch.testing.assert_close(schedule.eps_from_v(x[of], v[of], ti), eps[of])


def test_stable_diffusion_grid_and_its_tail() -> None:
    trajectory = SD.trajectory(10)
    assert torch.equal(trajectory.levels, SD.alpha_bars[[*range(901, 0, -100), 0]])
    assert SCHEDULES["scaled_linear", "one"].trajectory(10).levels[-1] == 1
    tail = trajectory.tail(0.3)
    assert tail.timesteps.tolist() == [201, 101, 1] and torch.equal(tail.levels, trajectory.levels[-4:])
    assert trajectory.tail(0).timesteps.tolist() == [1] and len(trajectory.tail(1)) == 10


counts = st.integers(1, 1000)


@given(schedule=schedules, T=counts, steps=counts, spacing=spacings, offset=st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_every_schedule_and_grid_falls_strictly(schedule, T: int, steps: int, spacing: str, offset: int) -> None:
    steps = min(steps, T)
    schedule = NoiseSchedule(**(asdict(schedule) | {"timesteps": T, "steps_offset": offset}))
    ab = schedule.alpha_bars
    assert ab.dtype == torch.float64 and ab.shape == (T,) and ab.min() > 0 and ab.max() < 1 and (ab.diff() < 0).all()
    trajectory = schedule.trajectory(steps, spacing)
    t, ab = trajectory.timesteps, trajectory.levels
    assert len(trajectory) == steps and t.shape == (steps,) and ab.shape == (steps + 1,)
    assert t.min() >= 0 and t.max() <= T - 1 and (t.diff() < 0).all()
    assert (ab[:-1].diff() > 0).all() and ab[-1] >= ab[-2]


@pytest.mark.parametrize("steps", [1, 2, 7, 30, 600, 1000])
def test_grids_by_their_definitions(steps: int) -> None:
    leading, trailing = (SD.trajectory(steps, spacing).timesteps.tolist() for spacing in SPACINGS)
    offset = 0 if steps == 1000 else 1  # the one count where SD's offset does not fit
    assert leading == [i * (1000 // steps) + offset for i in reversed(range(steps))]
    assert trailing[0] == 999 and all(abs(t - (1000 - i * 1000 / steps - 1)) <= 0.5 for i, t in enumerate(trailing))


@given(schedule=schedules, steps=st.integers(1, 60), spacing=spacings, mu=st.floats(-2, 2), s=st.floats(0.05, 3))
@few
def test_ddim_path_on_gaussian_data(schedule, steps: int, spacing: str, mu: float, s: float) -> None:
    """A step from a to b multiplies x - sqrt(a) mu by (sqrt(a b) s^2 + sqrt((1 - a) (1 - b))) / V(a)."""
    variance = lambda ab: ab * s**2 + 1 - ab

    def optimal(x: Tensor, t: int) -> Tensor:
        ab = float(schedule.alpha_bars[t])
        return math.sqrt(1 - ab) * (x - math.sqrt(ab) * mu) / variance(ab)

    trajectory, x, path = schedule.trajectory(steps, spacing), normal(5), []
    ab = trajectory.levels.tolist()
    end = ddim.sample(optimal, x, trajectory, callback=lambda i, x: path.append(x))
    centred = x - math.sqrt(ab[0]) * mu
    for found, a, b in zip(path, ab, ab[1:], strict=False):
        centred = centred * (math.sqrt(a * b) * s**2 + math.sqrt((1 - a) * (1 - b))) / variance(a)
        torch.testing.assert_close(found, centred + math.sqrt(b) * mu, rtol=1e-6, atol=1e-6)
    assert torch.equal(end, path[-1]) and len(path) == steps


@given(a=st.floats(0.001, 0.9), up=st.floats(0.001, 1), eta=st.floats(0, 1), seed=seeds)
@few
def test_a_step_follows_eq_12_with_the_sigma_of_eq_16(a: float, up: float, eta: float, seed: int) -> None:
    b = a + (1 - a) * up
    x, eps, noise = normal(3, 6, seed=seed)
    sigma = eta * math.sqrt((1 - b) / (1 - a)) * math.sqrt(1 - a / b)
    x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
    mean = math.sqrt(b) * x0 + math.sqrt(max(1 - b - sigma**2, 0)) * eps
    step = Trajectory(torch.tensor([1]), torch.tensor([a, b], dtype=torch.float64)).step
    torch.testing.assert_close(step(x, eps, 0, 1, eta), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(step(x, eps, 0, 1, eta, noise), mean + sigma * noise, rtol=1e-6, atol=1e-6)
    beta = 1 - a / b  # with eta 1, DDPM's posterior: Ho et al., eq. 7
    mean = (math.sqrt(b) * beta * x0 + math.sqrt(a / b) * (1 - b) * x) / (1 - a)
    drawn = mean + math.sqrt((1 - b) / (1 - a) * beta) * noise
    torch.testing.assert_close(step(x, eps, 0, 1, 1.0, noise), drawn, rtol=1e-6, atol=1e-6)


def test_steps_and_noise_keep_the_dtype_and_noise_is_the_same_in_each() -> None:
    drawn = noise_like(torch.empty(9, 8), torch.Generator().manual_seed(5))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        noise = noise_like(torch.empty(9, 8, dtype=dtype), torch.Generator().manual_seed(5))
        assert torch.equal(noise, drawn.to(dtype))
        assert SD.add_noise(noise, noise, torch.arange(9)).dtype == dtype
        assert SD.trajectory(9).step(noise, noise, 1, 2, 1.0, noise).dtype == dtype


@pytest.mark.parametrize("schedule, spacing", [*((SD, s) for s in SPACINGS), (FlowSchedule(shift=3.0), "auto")])
def test_a_samplers_latent_comes_back_in_float32(schedule, spacing) -> None:
    trajectory, x_T = schedule.trajectory(100, spacing), normal(3, 4, dtype=torch.float32)
    smooth = lambda x, t: 0.5 * network(x, t)  # every step must be a contraction
    x0 = ddim.sample(smooth, x_T, trajectory)
    assert (ddim.invert(smooth, x0, trajectory, fixed_point_steps=12).latent - x_T).abs().max() < 1e-5
    assert (ddim.invert(smooth, x0, trajectory).latent - x_T).abs().max() > 1e-3  # so the iterations are the reason


@given(schedule=schedules | flows, steps=st.integers(1, 80), spacing=spacings, fixed=st.integers(0, 2), seed=seeds)
@few
def test_a_replayed_recording_is_exact_for_any_network(schedule, steps, spacing, fixed, seed) -> None:
    trajectory, x0 = schedule.trajectory(steps, spacing), normal(2, 4, seed=seed)
    wild = lambda x, t: 3 * network(5 * x, t)  # far from a contraction
    recording = ddim.invert(wild, x0, trajectory, fixed)
    assert recording.eps.shape == (steps, 2, 4) and torch.equal(recording.latents[-1], x0)
    path = []
    ddim.sample(recording.replay, recording.latent, trajectory, callback=lambda i, x: path.append(x))
    # Near full noise x0 survives in x_T only as alpha times it; rounding is amplified by the inverse. Not in a flow.
    scale = float(recording.latents.abs().max()) / (1 if trajectory.flow else trajectory.mixture(0)[0])
    assert (torch.stack(path) - recording.latents[1:]).abs().max() < 1e-13 * scale
    assert torch.equal(recording.replay(x0, trajectory.timesteps[-1].item() - 1), recording.eps[-1])  # the nearest


def test_callback_replaces_the_latent_and_progress_sees_every_step() -> None:
    """With every latent replaced by the recorded one, any network ends at x0."""
    trajectory, x0, bars = Sampler(steps=10).trajectory(SD), normal(2, 4), []
    progress = lambda steps: (bars.append(i) or i for i in steps)
    recording = ddim.invert(network, x0, trajectory, progress=progress)
    back = lambda i, x: recording.latents[i + 1]
    for sampler in (Sampler(), Sampler(eta=0.3), Sampler(eta=1.0)):
        assert torch.equal(sampler.sample(network, recording.latent, trajectory, None, progress, back), x0)
    assert bars == [*range(10)][::-1] + [*range(10)] * 3
    once = Sampler(eta=1.0).sample(network, x0, trajectory.tail(0))  # the last step draws no noise
    assert torch.equal(once, trajectory.step(x0, network(x0, 1), 9, 10, 1.0))


def test_a_wrong_setting_is_named() -> None:
    wrong = [("spacing", "karras"), ("eta", 1.1), ("eta", "some"), ("offset", -1), ("offset", 0.5)]
    for name, value in [*wrong, ("steps", 0), ("steps", 1001), ("steps", 10.0)]:
        for schedule in (SD, FlowSchedule()):
            with pytest.raises(InputError, match=f"sampler.{name}"):
                Sampler(**{name: value}).trajectory(schedule)
