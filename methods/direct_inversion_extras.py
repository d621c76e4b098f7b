"""Additions to Direct Inversion: a start at a given cosine, an inversion on another grid, and agreement with CLIP."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import InputError
from methods.base import Run
from methods.optimisation import minimise
from samplers import FlowSchedule, NoiseSchedule, Trajectory


def other_grid(schedule: NoiseSchedule | FlowSchedule, trajectory: Trajectory, steps: int) -> Trajectory:
    """`steps` timesteps, evenly spaced, from the first of `trajectory` down, that end where it ends: another walk
    between the same two noise levels. Raises InputError for more than there are timesteps."""
    if isinstance(schedule, FlowSchedule):
        return schedule.trajectory(steps)
    levels = int(trajectory.timesteps[0]) + 1
    if steps > levels:
        raise InputError(f"method.inversion_steps is {steps}: below the sampler's first timestep there are {levels}")
    timesteps = torch.tensor([round((steps - i) * levels / steps) - 1 for i in range(steps)])
    return Trajectory(timesteps, torch.cat([schedule.alpha_bars[timesteps], trajectory.levels[-1:]]))


def with_cosine(z: Tensor, noise: Tensor, s: float) -> Tensor:
    """A latent at the cosine s in [0, 1] to z, with z's mean and variance.

    With z = m + d, where d has mean 0: m + r d + sqrt(1 - r^2) o, where o is the noise made orthogonal to d and to the
    constant latent, and as long as d. It has the cosine (|m|^2 + r |d|^2) / |z|^2, which is solved for r; r stays at -1
    where a mean above the standard deviation forbids the cosine.
    """
    d, o = z - z.mean(), noise - noise.mean()
    o = o - (o * d).sum() / d.square().sum() * d
    r = max(-1.0, 1 - (1 - s) * float(z.square().sum() / d.square().sum()))
    return z.mean() + r * d + math.sqrt(1 - r**2) * (d.norm() / o.norm()) * o


def cohere(model, prompt: str, z_edit: Tensor, weight: float, steps: int, lr: float, run: Run, stage: str) -> Tensor:
    """Pull an edited latent towards the prompt as CLIP sees it, and hold it near its place, by Adam:

    min_z  weight (1 - cos(CLIP(D(z)), CLIP(prompt))) + mean (z - z_edit)^2
    """
    z, text = z_edit.float().clone(), model.clip.text_features([prompt])

    def loss() -> dict[str, Tensor]:
        agreement = (model.clip.image_features(model.decode_latents(z)) * text).sum()
        return {"clip": weight * (1 - agreement), "distance": F.mse_loss(z, z_edit.float())}

    minimise(loss, [z], run, stage, steps, lr)
    return z.detach().to(z_edit)
