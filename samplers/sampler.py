"""The sampler as a setting: which walk, how many steps, how much noise. conf/sampler has presets."""

from dataclasses import dataclass

import torch
from torch import Tensor

from errors import InputError, check

from . import ddim
from .guidance import Denoiser
from .schedule import SPACINGS, VARIANCE_PRESERVING, FlowSchedule, NoiseSchedule, Trajectory, noise_like

SAMPLERS, VARIANCES = ("ddim", "ddpm"), ("posterior", "fixed_large")


@dataclass(frozen=True)
class Sampler:
    """Raises InputError for an unknown name and an eta out of range; `trajectory` does for `steps`."""

    group = "sampler"  # its settings on the command line

    kind: str = "ddim"  # ddim (for a flow model its counterpart, Euler's steps) | ddpm
    steps: int = 50  # network calls, from 1 to the schedule's length
    spacing: str = "auto"  # auto | leading | trailing | linspace: `NoiseSchedule.trajectory`. A flow has one grid
    offset: int | None = None  # added to every timestep of a leading grid; null: the schedule's own
    eta: float = 0.0  # of ddim, in [0, 1]: 0 is deterministic, 1 equals ddpm
    variance: str = "posterior"  # of ddpm: posterior | fixed_large

    def __post_init__(self) -> None:
        check(self, shares=["eta"], kind=SAMPLERS, spacing=SPACINGS, variance=VARIANCES)

    def trajectory(self, schedule: NoiseSchedule | FlowSchedule) -> Trajectory:
        """The grid of these settings on a model's schedule. Raises InputError for ancestral sampling of a flow."""
        if isinstance(schedule, FlowSchedule) and (self.kind == "ddpm" or self.eta > 0):
            raise InputError(VARIANCE_PRESERVING)
        return schedule.trajectory(self.steps, self.spacing, self.offset)

    def step(self, x: Tensor, eps: Tensor, trajectory: Trajectory, i: int, noise: Tensor | None = None) -> Tensor:
        """Step i of a variance-preserving trajectory. `noise` is a standard normal draw; without one the step's mean
        is returned."""
        ddpm, levels = self.kind == "ddpm", trajectory.alpha_bars[i : i + 2]
        return ddim.step(x, eps, *levels, 1.0 if ddpm else self.eta, noise, ddpm and self.variance == "fixed_large")

    def sample(
        self,
        denoise: Denoiser,
        x: Tensor,
        trajectory: Trajectory,
        generator: torch.Generator | None = None,
        progress: ddim.Progress | None = None,
        callback: ddim.Callback | None = None,
    ) -> Tensor:
        """`ddim.walk` from noise to clean along `trajectory`, which may be a part of `self.trajectory(schedule)`. The
        last step returns its mean, since no later one would remove noise (Ho et al., algorithm 2)."""
        if self.kind == "ddim" and self.eta == 0:
            return ddim.sample(denoise, x, trajectory, progress, callback)

        def move(x: Tensor, eps: Tensor, i: int) -> Tensor:
            noise = noise_like(x, generator) if i + 1 < len(trajectory) else None
            return self.step(x, eps, trajectory, i, noise)

        return ddim.walk(denoise, x, trajectory, move, progress, callback)
