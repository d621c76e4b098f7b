"""DDPM inversion: an edit friendly noise space (Huberman-Spiegelglas, Kulikov & Michaeli, 2023, arXiv 2304.06140).

A stochastic sampler draws x_{t-1} = mu_t(x_t) + sigma_t z_t (eq. 3). Here the noise maps z_t are those that lead along
a path to the given image: the x_t are drawn independently of each other, which is what makes the maps edit friendly,

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps_t,    eps_t ~ N(0, I) anew for each t   (eq. 6)
    sigma_t z_t = x_{t-1} - mu_t(x_t)                                                               (eq. 5)

and sampling with the same maps under another prompt edits the image; under the same prompt it returns the image.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from errors import InputError
from methods.base import Edit, EditResult, Reporter, check, cosine, generator, source_latent, to_image
from samplers import Denoiser, Sampler, Trajectory, ddim, ddpm, guided, noise_like


@dataclass
class DDPMInversion:
    """The settings. conf/method/ddpm_inversion.yaml says what each one does and its symbol. Raises InputError for one
    that is out of range, and for a sampler without noise."""

    sampler: Sampler
    skip: float = 0.2  # of the steps, from the noisy end
    guidance_scale: float = 2.0
    source_guidance_scale: float = 2.0
    num_samples: int = 1

    def __post_init__(self) -> None:
        check(self, "skip", high=1)
        check(self, "guidance_scale", "source_guidance_scale")
        check(self, "num_samples", low=1, whole=True)
        if self.sampler.kind == "ddim" and self.sampler.eta == 0:
            raise InputError(
                "sampler.eta is 0: this method finds the sampler's noise; take sampler=ddpm or sampler.eta=1"
            )

    @torch.no_grad()
    def edit(self, model, task, reporter: Reporter = Reporter(), seed: int = 0) -> EditResult:
        """One edit for each sample, each with noise of its own. An unchanged prompt at unchanged guidance gives the
        input's latent back, so the reconstruction is what the autoencoder makes of that. A task without a source
        prompt is inverted under the empty one, as the paper allows."""
        trajectory = self.sampler.trajectory(model.schedule)
        trajectory = trajectory.tail(max(1, round((1 - self.skip) * len(trajectory))))
        bar = partial(reporter.progress, range(len(trajectory)), total=len(trajectory))
        x_0 = source_latent(model, task.image)
        source, target, null = (model.encode_text([text]) for text in (task.source_prompt, task.prompt, ""))
        as_source = guided(model, source, null, self.source_guidance_scale)
        as_target = guided(model, target, null, self.guidance_scale)
        edits, latents = [], []
        for i in range(self.num_samples):
            with reporter.stage("inversion"):
                eps = generator(seed, "path", i)
                path = [model.schedule.add_noise(x_0, noise_like(x_0, eps), int(t)) for t in trajectory.timesteps]
                path.append(x_0)
                # sigma_t z_t, undivided by sigma_t, is there at the last step too, where sigma_t is 0 if the walk ends
                # at alpha_bar 1 (the paper's code drops that one, and with it the exactness).
                maps = [path[n + 1] - self.mean(as_source, path[n], trajectory, n) for n in bar(stage="inversion")]
            with reporter.stage("editing"):
                x = path[0]
                for n in bar(stage="editing"):
                    x = self.mean(as_target, x, trajectory, n) + maps[n]
                settings = {"skip": float(self.skip), "sample": i}
                edits.append(Edit(to_image(model, x), settings, {"edit_source_cosine": cosine(x, x_0)}))
                latents.append(x)
        with reporter.stage("reconstruction"):
            reconstruction = to_image(model, x_0)
        tensors = {"source_latent": x_0, "edited_latents": torch.cat(latents)}
        return EditResult(edits, reconstruction, tensors=tensors)

    def mean(self, denoise: Denoiser, x: Tensor, trajectory: Trajectory, n: int) -> Tensor:
        """mu_t(x_t) of the n-th step: the sampler's step without its noise."""
        step = ddpm.step if self.sampler.kind == "ddpm" else partial(ddim.step, eta=self.sampler.eta)
        eps = denoise(x, int(trajectory.timesteps[n]))
        return step(x, eps, trajectory.alpha_bars[n], trajectory.alpha_bars[n + 1])
