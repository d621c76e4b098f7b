"""SDEdit (Meng et al., 2021, arXiv 2108.01073): noise the image part of the way, then denoise it under the prompt.

Section 3, algorithm 1, in the variance-preserving form of its appendix: x_t0 = sqrt(alpha_bar_t0) x_0 +
sqrt(1 - alpha_bar_t0) eps, from which the reverse process is solved. A flow's is (1 - sigma) x_0 + sigma eps.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from methods.base import RECONSTRUCTION, Method, Result, Run, check
from samplers import Sampler, guided, noise_like


@dataclass
class SDEdit(Method):
    """The reconstruction is the latent itself: what the autoencoder gives back."""

    sampler: Sampler  # the reverse process, with its noise (eta 1; not for a flow model) or without (eta 0)
    strength: float = 0.8  # [t0] how far the image is noised: 0 nearly keeps it (one step is walked), 1 keeps nothing
    guidance_scale: float = 3.0  # classifier-free guidance; 1 is without
    num_samples: int = 1  # edits, each from noise of its own

    def __post_init__(self) -> None:
        check(self, shares=["strength"], counts=["num_samples"])

    def edit(self, model, task, z: Tensor, run: Run) -> Iterator[Result]:
        trajectory = self.sampler.trajectory(model.schedule).tail(self.strength)
        denoise = guided(model, task.prompt, self.guidance_scale, task.negative_prompt)
        for i in range(self.num_samples):
            x = model.schedule.add_noise(z, noise_like(z, run.noise("start", i)), trajectory.timesteps[0].item())
            x = self.sampler.sample(denoise, x, trajectory, run.noise("sampling", i), run.progress("editing"))
            yield {"strength": float(self.strength), "sample": i}, x
        yield RECONSTRUCTION, z
