"""DDIM (Song, Meng & Ermon 2021, arXiv 2010.02502): one step, walked down to sample and up to invert. With eta 1 the
step is DDPM's ancestral sampling (Ho, Jain & Abbeel 2020, arXiv 2006.11239) on any sub-grid of the schedule.

Both walks take the same `Trajectory` and run without gradients. Steps are differentiable, for loops of a method's own.
Under a flow schedule the walks are the same, and the steps, with eta 0, Euler's.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .guidance import Denoiser
from .schedule import Trajectory

Progress = Callable[[Iterable[int]], Iterable[int]]  # wraps the loop over step numbers, as tqdm does
Callback = Callable[[int, Tensor], Tensor | None]  # (i, x after step i) -> a replacement for x, or None


def step(
    x: Tensor,
    eps: Tensor,
    alpha_bar_from: float,
    alpha_bar_to: float,
    eta: float = 0.0,
    noise: Tensor | None = None,
    large: bool = False,
) -> Tensor:
    """x at alpha_bar_from -> x at alpha_bar_to, given the noise eps in it. Eq. 12, with sigma by eq. 16.

    With eta 0 it goes either way, and going back with the same eps undoes it. With eta > 0 it goes down only; `noise`
    is then a standard normal draw, and without one the step's mean is returned. With eta 1 it draws from the posterior
    q(x_to | x_from, x0) at the x0 that eps implies (Ho et al., eq. 6, 7, 11), exact for data that is a single point.
    `large` gives the noise the variance 1 - alpha_bar_from / alpha_bar_to instead ("fixed large" in Ho et al.'s code),
    exact for data that is standard normal.
    x, eps, noise: (B, ...); alpha_bars in (0, 1], numbers or 0-dim tensors.
    """
    a, b = float(alpha_bar_from), float(alpha_bar_to)
    sigma = eta * math.sqrt((1 - b) / (1 - a) * (1 - a / b)) if eta > 0 else 0.0
    # sqrt(b) x0 + sqrt(1 - b - sigma^2) eps, with x0 = (x - sqrt(1 - a) eps) / sqrt(a) put in
    scale = math.sqrt(b / a)
    direction = math.sqrt(max(1 - b - sigma**2, 0.0)) - scale * math.sqrt(1 - a)
    mean = scale * x + direction * eps
    if noise is None or eta == 0:
        return mean
    return mean + (math.sqrt(1 - a / b) if large else sigma) * noise


@torch.no_grad()
def walk(
    denoise: Denoiser,
    x: Tensor,
    trajectory: Trajectory,
    move: Callable[[Tensor, Tensor, int], Tensor],
    progress: Progress | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Noise -> clean: x (B, ...) at the first noise level is brought to the last, one network call a step.
    `move(x, prediction, i)` takes step i; a confined trajectory puts its outside back. `callback(i, x)` sees x after
    that and may return a replacement."""
    for i in (progress or iter)(range(len(trajectory))):
        x = trajectory.confine(x, move(x, denoise(x, trajectory.timesteps[i].item()), i), i)
        replacement = None if callback is None else callback(i, x)
        x = x if replacement is None else replacement
    return x


def sample(
    denoise: Denoiser,
    x: Tensor,
    trajectory: Trajectory,
    progress: Progress | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """`walk` by the trajectory's own steps, without noise: DDIM with eta 0, and Euler's steps of a flow."""
    move = lambda x, prediction, i: trajectory.step(x, prediction, i, i + 1)
    return walk(denoise, x, trajectory, move, progress, callback)


@dataclass
class Inversion:
    """An inversion, step by step."""

    latents: Tensor  # (steps + 1, B, ...); latents[i] is at trajectory.levels[i], latents[-1] is the given x0
    eps: Tensor  # (steps, B, ...); prediction eps[i] belongs to timesteps[i], and led from latents[i + 1] to latents[i]
    timesteps: Tensor  # (steps,) descending, those of the trajectory

    @property
    def latent(self) -> Tensor:
        """(B, ...) The inverted latent, where sampling starts."""
        return self.latents[0]

    def replay(self, x: Tensor, t: float) -> Tensor:
        """The recorded noise as a denoiser: `sample(inversion.replay, inversion.latent, trajectory)` returns x0 to
        rounding error for any network, since each step down undoes the step up. A timestep that was not recorded gets
        the noise of the nearest one."""
        return self.eps[int((self.timesteps - t).abs().argmin())]


@torch.no_grad()
def invert(
    denoise: Denoiser, x0: Tensor, trajectory: Trajectory, fixed_point_steps: int = 0, progress: Progress | None = None
) -> Inversion:
    """Clean -> noise: from x0 (B, ...) at levels[-1] to the x at levels[0] from which `sample` with eta 0
    arrives at x0, with every latent and every noise on the way.

    Sampling goes from x_t to the lower latent by eps(x_t, t); so this solves x_t = step(lower, eps(x_t, t)).
    The first iterate evaluates eps on the lower latent, but at t: the noise level that sampling will see.
    1 + fixed_point_steps network calls a step. Without fixed-point steps the error is proportional to the stride;
    with them it shrinks geometrically, wherever the step is a contraction.
    """
    x, latents, noises = x0, [x0], []
    for i in (progress or iter)(range(len(trajectory))[::-1]):
        for _ in range(1 + fixed_point_steps):
            eps = denoise(x, trajectory.timesteps[i].item())
            x = trajectory.step(latents[-1], eps, i + 1, i)
        latents.append(x)
        noises.append(eps)
    return Inversion(torch.stack(latents[::-1]), torch.stack(noises[::-1]), trajectory.timesteps)
