"""Flow matching against closed forms: the schedule, the walks, the methods' laws and the loss of training.

For Gaussian data x0 ~ N(mu, s^2) the marginal at sigma is normal, with mean (1 - sigma) mu and variance
V = (1 - sigma)^2 s^2 + sigma^2. The optimal velocity is linear in x, and its flow keeps (x - mean) / sqrt(V).
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samplers import FlowSchedule, NoiseSchedule, as_velocity, ddim
from tests.conftest import normal

MU, S = 0.7, 0.5
schedules = st.builds(FlowSchedule, shift=st.floats(1, 6))
few = settings(max_examples=40, deadline=None)


def variance(sigma):
    return (1 - sigma) ** 2 * S**2 + sigma**2


def velocity(x, t):
    """E[noise - x0 | x], by the regression of noise and of x0 on x."""
    sigma = t / 1000
    return (sigma - (1 - sigma) * S**2) / variance(sigma) * (x - (1 - sigma) * MU) - MU


def flowed(x, a, b):
    """x at sigma a, carried by the exact flow to sigma b."""
    return (1 - b) * MU + math.sqrt(variance(b) / variance(a)) * (x - (1 - a) * MU)


@given(schedule=schedules, steps=st.integers(1, 1000))
@few
def test_the_grid_falls_from_noise_to_clean_and_is_shifted_twice(schedule, steps):
    trajectory = schedule.trajectory(steps)
    sigmas = trajectory.levels
    assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all() and len(trajectory) == steps
    torch.testing.assert_close(trajectory.timesteps, 1000 * sigmas[:-1])
    unshifted = lambda sigma: sigma / (schedule.shift - (schedule.shift - 1) * sigma)
    gaps = unshifted(sigmas[:-1]).diff()
    torch.testing.assert_close(gaps, gaps.mean().expand_as(gaps) if len(gaps) else gaps)
    if steps > 1:
        assert float(unshifted(unshifted(sigmas[-2]))) == pytest.approx(0.001)
    tail = trajectory.tail(0.5)
    assert torch.equal(tail.levels, sigmas[-len(tail) - 1 :]) and tail.flow
    with pytest.raises(ValueError, match="eta"):
        tail.step(sigmas, sigmas, 0, 1, eta=0.5)


@given(schedule=st.builds(NoiseSchedule, final_alpha_bar=st.just("one")), steps=st.integers(1, 60))
@few
def test_an_epsilon_model_walks_the_same_path_as_a_flow(schedule, steps):
    denoise = lambda x, t: torch.sin(3 * x + t / 1000)
    trajectory, (x,) = schedule.trajectory(steps), normal(1, 2, 3, 4, 4)
    found = ddim.sample(as_velocity(denoise, schedule), x / sum(trajectory.mixture(0)), trajectory.as_flow())
    torch.testing.assert_close(found, ddim.sample(denoise, x, trajectory), rtol=1e-7, atol=1e-7)


def test_noise_and_target_at_one_level_and_at_one_for_each_sample():
    schedule, (x0, noise) = FlowSchedule(), normal(2, 3, 4, 2, 2)
    t = torch.tensor([0.0, 250.5, 1000.0], dtype=torch.float64)
    x = schedule.add_noise(x0, noise, t)
    assert torch.equal(x[0], x0[0]) and torch.equal(x[2], noise[2])
    torch.testing.assert_close(x[1], schedule.add_noise(x0[1], noise[1], 250.5))
    torch.testing.assert_close(x - t.view(-1, 1, 1, 1) / 1000 * schedule.target(x0, noise), x0)


def test_times_of_training_are_shifted_logit_normal():
    draw = lambda shift: FlowSchedule(shift=shift).draw(200_000, torch.Generator().manual_seed(0)) / 1000
    logits = draw(1.0).logit()
    assert logits.mean().abs() < 0.01 and (logits.std() - 1).abs() < 0.01
    torch.testing.assert_close(draw(3.0).logit(), logits + math.log(3), atol=1e-3, rtol=0)  # what the shift is


@pytest.mark.parametrize("up", [False, True])
def test_walks_converge_to_the_exact_flow_at_first_order(up):
    errors = []
    for steps in (250, 500):
        trajectory, x = FlowSchedule().trajectory(steps), normal(50)
        found = ddim.invert(velocity, x, trajectory).latent if up else ddim.sample(velocity, x, trajectory)
        errors.append(float((found - flowed(x, *((0, 1) if up else (1, 0)))).abs().max()))
    assert errors[0] < 0.06 and errors[0] / errors[1] == pytest.approx(2, rel=0.15)
