"""The sampler as a setting: how many steps, and how much noise. conf/sampler has presets."""

from dataclasses import dataclass

import torch
from torch import Tensor

from errors import InputError, check

from . import ddim
from .guidance import Denoiser
from .schedule import SPACINGS, FlowSchedule, NoiseSchedule, Trajectory, noise_like


@dataclass(frozen=True)
class Sampler:
    """Raises InputError for an unknown name, an eta out of range and no steps; `trajectory` does for too many."""

    group = "sampler"  # its settings on the command line

    steps: int = 50  # network calls, from 1 to the schedule's length
    spacing: str = "auto"  # auto | leading | trailing: `NoiseSchedule.trajectory`. A flow has one grid
    offset: int | None = None  # added to every timestep of a leading grid; null: the schedule's own
    eta: float = 0.0  # noise, in [0, 1]: 0 is none (DDIM, or Euler's steps of a flow), 1 is DDPM's ancestral sampling

    def __post_init__(self) -> None:
        check(self, shares=["eta"], counts=["steps"], spacing=SPACINGS)

    def trajectory(self, schedule: NoiseSchedule | FlowSchedule) -> Trajectory:
        """The grid of these settings on a model's schedule. Raises InputError for ancestral sampling of a flow."""
        if isinstance(schedule, FlowSchedule) and self.eta > 0:
            raise InputError("a flow model has neither ancestral sampling (use sampler=ddim) nor DDPM inversion")
        return schedule.trajectory(self.steps, self.spacing, self.offset)

    def sample(
        self,
        denoise: Denoiser,
        x: Tensor,
        trajectory: Trajectory,
        generator: torch.Generator | None = None,
        progress: ddim.Progress | None = None,
        callback: ddim.Callback | None = None,
    ) -> Tensor:
        """`ddim.sample` along `trajectory`, which may be a part of `self.trajectory(schedule)`, with the noise of eta.
        The last step returns its mean, since no later one would remove noise (Ho et al., algorithm 2)."""

        def move(x: Tensor, eps: Tensor, i: int) -> Tensor:
            noise = noise_like(x, generator) if self.eta > 0 and i + 1 < len(trajectory) else None
            return trajectory.step(x, eps, i, i + 1, self.eta, noise)

        return ddim.sample(denoise, x, trajectory, progress, callback, move)
