"""Walks along a trajectory: DDIM (Song, Meng & Ermon 2021, arXiv 2010.02502) down to sample and up to invert.

Both take the same `Trajectory` and run without gradients; its step is differentiable, for loops of a method's own.
Under a flow schedule the walks are the same, and the steps Euler's.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .guidance import Denoiser
from .schedule import Trajectory

Progress = Callable[[Iterable[int]], Iterable[int]]  # wraps the loop over step numbers, as tqdm does
Callback = Callable[[int, Tensor], Tensor | None]  # (i, x after step i) -> a replacement for x, or None


@torch.no_grad()
def sample(
    denoise: Denoiser,
    x: Tensor,
    trajectory: Trajectory,
    progress: Progress | None = None,
    callback: Callback | None = None,
    move: Callable[[Tensor, Tensor, int], Tensor] | None = None,
) -> Tensor:
    """Noise -> clean: x (B, ...) at the first noise level is brought to the last, one network call a step.
    `move(x, prediction, i)` takes step i, by default the trajectory's own, without noise; a confined trajectory puts
    its outside back. `callback(i, x)` sees x after that and may return a replacement."""
    move = move or (lambda x, prediction, i: trajectory.step(x, prediction, i, i + 1))
    for i in (progress or iter)(range(len(trajectory))):
        x = trajectory.confine(x, move(x, denoise(x, trajectory.timesteps[i].item()), i), i)
        replacement = None if callback is None else callback(i, x)
        x = x if replacement is None else replacement
    return x


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
        rounding error for any network. A timestep that was not recorded gets the noise of the nearest one."""
        return self.eps[int((self.timesteps - t).abs().argmin())]


@torch.no_grad()
def invert(
    denoise: Denoiser, x0: Tensor, trajectory: Trajectory, fixed_point_steps: int = 0, progress: Progress | None = None
) -> Inversion:
    """Clean -> noise: from x0 (B, ...) at levels[-1] to the x at levels[0] that `sample` brings to x0, with the path.

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
