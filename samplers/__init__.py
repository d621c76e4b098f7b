"""Noise schedules, DDPM, DDIM and guidance.

Knows no network and no text: a denoiser is a plain callable (x, t) -> eps.
"""

from . import ddim, ddpm
from .guidance import Denoiser, guided
from .sampler import Sampler
from .schedule import NoiseSchedule, Trajectory, noise_like

__all__ = ["Denoiser", "NoiseSchedule", "Sampler", "Trajectory", "ddim", "ddpm", "guided", "noise_like"]
