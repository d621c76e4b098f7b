"""The sampler as a setting: which walk, how many steps, how much noise. conf/sampler has presets."""

from dataclasses import dataclass

import torch
from torch import Tensor

from errors import InputError, check

from . import ddim, ddpm
from .guidance import Denoiser
from .schedule import SPACINGS, VARIANCE_PRESERVING, FlowSchedule, NoiseSchedule, Trajectory

SAMPLERS = ("ddim", "ddpm")


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
        check(self, shares=["eta"], kind=SAMPLERS, spacing=SPACINGS, variance=ddpm.VARIANCES)

    def trajectory(self, schedule: NoiseSchedule | FlowSchedule) -> Trajectory:
        """The grid of these settings on a model's schedule. Raises InputError for ancestral sampling of a flow."""
        if isinstance(schedule, FlowSchedule) and (self.kind == "ddpm" or self.eta > 0):
            raise InputError(VARIANCE_PRESERVING)
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
        """Noise -> clean along `trajectory`, which may be a part of `self.trajectory(schedule)`."""
        if self.kind == "ddpm":
            return ddpm.sample(denoise, x, trajectory, self.variance, generator, progress, callback)
        return ddim.sample(denoise, x, trajectory, self.eta, generator, progress, callback)
