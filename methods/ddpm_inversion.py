"""DDPM inversion: an edit friendly noise space (Huberman-Spiegelglas, Kulikov & Michaeli, 2023, arXiv 2304.06140).

A stochastic sampler draws x_{t-1} = mu_t(x_t) + sigma_t z_t (eq. 3). Here the noise maps z_t are those that lead along
a path to the given picture. The x_t are drawn independently of each other, which makes the maps edit friendly:

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps_t,    eps_t ~ N(0, I) anew for each t   (eq. 6)
    sigma_t z_t = x_{t-1} - mu_t(x_t)                                                               (eq. 5)

Sampling with the same maps under another prompt edits the picture; under the same prompt it returns the picture.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from errors import InputError
from methods.base import RECONSTRUCTION, Method, Result, Run, check
from samplers import Sampler, ddim, guided, noise_like


@dataclass
class DDPMInversion(Method):
    """The reconstruction is the latent itself, which an unchanged prompt at unchanged guidance gives back. A task
    without a source prompt is inverted under the empty one, as the paper allows."""

    sampler: Sampler  # with eta above 0; the paper's is DDPM, eta 1
    skip: float = 0.2  # [T_skip / T] share of the steps left out at the noisy end: 0 edits most, 1 hardly at all
    guidance_scale: float = 1.5  # classifier-free guidance of the edit [strength]
    source_guidance_scale: float = 1.0  # and of the inversion
    num_samples: int = 1  # edits, each along a path of its own

    def __post_init__(self) -> None:
        check(self, shares=["skip"], counts=["num_samples"])
        if self.sampler.eta == 0:
            raise InputError("sampler.eta is 0, so there is no noise to find: use sampler=ddpm or sampler.eta=1")

    def edit(self, model, task, z: Tensor, run: Run) -> Iterator[Result]:
        trajectory = self.sampler.trajectory(model.schedule).tail(1 - self.skip)
        as_source = guided(model, task.source_prompt, self.source_guidance_scale, task.negative_prompt)
        as_target = guided(model, task.prompt, self.guidance_scale, task.negative_prompt)
        timesteps = trajectory.timesteps.tolist()
        step = lambda x, eps, n: trajectory.step(x, eps, n, n + 1, self.sampler.eta)  # its mean, without noise
        for i in range(self.num_samples):
            eps = run.noise("path", i)
            path = [model.schedule.add_noise(z, noise_like(z, eps), t) for t in timesteps] + [z]
            # sigma_t z_t, undivided: it is defined at the last step too, where sigma_t is 0 if the walk ends at
            # alpha_bar 1. The paper's code drops that one, and so is not exact.
            maps = []
            for n in run.progress("inversion")(range(len(timesteps))):
                mean = step(path[n], as_source(path[n], timesteps[n]), n)  # mu_t(x_t)
                maps.append(path[n + 1] - mean)

            def move(x: Tensor, eps: Tensor, n: int, maps=maps) -> Tensor:
                return step(x, eps, n) + maps[n]

            x = ddim.sample(as_target, path[0], trajectory, run.progress("editing"), move=move)
            yield {"skip": float(self.skip), "sample": i}, x
        yield RECONSTRUCTION, z
