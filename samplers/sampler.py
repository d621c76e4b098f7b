"""The sampler as a setting: which walk, how many steps, how much noise. Built from conf/sampler/*.yaml."""

from dataclasses import dataclass

import torch
from torch import Tensor

from errors import InputError

from . import ddim, ddpm
from .guidance import Denoiser
from .schedule import SPACINGS, NoiseSchedule, Trajectory

SAMPLERS = ("ddim", "ddpm")


@dataclass(frozen=True)
class Sampler:
    """Settings of `ddim.sample` or `ddpm.sample`; a value that makes no sense raises InputError at once.

    steps:    network calls, from 1 to the schedule's length.
    spacing:  leading, trailing or linspace; see `NoiseSchedule.trajectory`.
    eta:      in [0, 1], for ddim.   variance: posterior or fixed_large, for ddpm.
    """

    kind: str = "ddim"
    steps: int = 50
    spacing: str = "leading"
    eta: float = 0.0
    variance: str = "posterior"

    def __post_init__(self) -> None:
        if self.kind not in SAMPLERS:
            raise InputError(f"unknown sampler {self.kind!r}; there are {', '.join(SAMPLERS)}")
        if not isinstance(self.steps, int) or self.steps < 1:
            raise InputError(f"sampler.steps must be a whole number, 1 or more, not {self.steps!r}")
        if self.spacing not in SPACINGS:
            raise InputError(f"unknown sampler.spacing {self.spacing!r}; there are {', '.join(SPACINGS)}")
        if not isinstance(self.eta, int | float) or not 0 <= self.eta <= 1:
            raise InputError(f"sampler.eta must be a number from 0 to 1, not {self.eta!r}")
        if self.variance not in ddpm.VARIANCES:
            known = ", ".join(ddpm.VARIANCES)
            raise InputError(f"unknown sampler.variance {self.variance!r}; there are {known}")

    def trajectory(self, schedule: NoiseSchedule) -> Trajectory:
        """The grid of these settings on a model's schedule."""
        return schedule.trajectory(self.steps, self.spacing)

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
