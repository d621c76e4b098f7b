"""SDEdit (Meng et al., 2021, arXiv 2108.01073): noise the image part of the way, then denoise it under the prompt.

Section 3, algorithm 1, in the variance-preserving form of its appendix: x_t0 = sqrt(alpha_bar_t0) x_0 +
sqrt(1 - alpha_bar_t0) eps, from which the reverse process is solved down to t = 0.
"""

from dataclasses import dataclass

import torch

from methods.base import Edit, EditResult, Reporter, check, cosine, generator, source_latent, to_image
from samplers import Sampler, guided, noise_like


@dataclass
class SDEdit:
    """The settings: see conf/method/sdedit.yaml. Raises InputError for one that is out of range."""

    sampler: Sampler
    strength: float = 0.7  # t0, as a share of the trajectory
    guidance_scale: float = 3.0
    num_samples: int = 1

    def __post_init__(self) -> None:
        check(self, "strength", high=1)
        check(self, "guidance_scale")
        check(self, "num_samples", low=1, whole=True)

    @torch.no_grad()
    def edit(self, model, task, reporter: Reporter = Reporter(), seed: int = 0) -> EditResult:
        """One edit for each sample, from noise of its own. The reconstruction is what the autoencoder gives back."""
        trajectory = self.sampler.trajectory(model.schedule)
        trajectory = trajectory.tail(max(1, round(self.strength * len(trajectory))))
        z = source_latent(model, task.image)
        denoise = guided(model, model.encode_text([task.prompt]), model.encode_text([""]), self.guidance_scale)
        bar = lambda steps: reporter.progress(steps, "editing", len(trajectory))
        edits, latents = [], []
        with reporter.stage("editing"):
            for i in range(self.num_samples):
                noise = noise_like(z, generator(seed, "start", i))
                x = model.schedule.add_noise(z, noise, int(trajectory.timesteps[0]))
                x = self.sampler.sample(denoise, x, trajectory, generator(seed, "sampling", i), bar)
                settings = {"strength": float(self.strength), "sample": i}
                edits.append(Edit(to_image(model, x), settings, {"edit_source_cosine": cosine(x, z)}))
                latents.append(x)
        with reporter.stage("reconstruction"):
            reconstruction = to_image(model, z)
        tensors = {"source_latent": z, "edited_latents": torch.cat(latents)}
        return EditResult(edits, reconstruction, tensors=tensors)
