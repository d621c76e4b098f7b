"""The networks of a latent text-to-image diffusion model, and loading them."""

from models.checkpoints import load, save
from models.latent_diffusion import LatentDiffusion, build

__all__ = ["LatentDiffusion", "build", "load", "save"]
