"""Noise schedules, trajectories, DDIM with DDPM, and guidance.

Knows no network: a denoiser is a plain callable (x, t) -> prediction, epsilon under a variance-preserving schedule and
the velocity noise - x0 under a flow schedule.
"""

from . import ddim
from .guidance import Conditioning, Denoiser, as_velocity, guided
from .sampler import Sampler
from .schedule import FlowSchedule, NoiseSchedule, Trajectory, noise_like

__all__ = [
    "Conditioning", "Denoiser", "FlowSchedule", "NoiseSchedule", "Sampler", "Trajectory", "as_velocity", "ddim",
    "guided", "noise_like",
]  # fmt: skip
