"""FlowEdit: inversion-free text-based editing using pre-trained flow models (Kulikov et al. 2024, arXiv 2412.08629).

A path leads directly from the picture to its edit, without passing through noise. At each noise level the picture is
noised, the path's point is moved by as much, and the path follows the difference of the two velocities:

    z_src = (1 - sigma) x_src + sigma noise,    z_tar = z + z_src - x_src
    dz / dsigma = v(z_tar, target prompt) - v(z_src, source prompt)
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from errors import InputError
from methods.base import RECONSTRUCTION, Method, Result, Run, check_invertible
from samplers import Sampler, as_velocity, ddim, guided, noise_like


@dataclass
class FlowEdit(Method):
    """Algorithm 1; the defaults fit the shipped model. The reconstruction is the latent itself, which equal prompts at
    equal guidance give back. A task without a source prompt starts from the empty one."""

    sampler: Sampler  # without noise (eta 0)
    n_max: int = 38  # of the sampler's steps (50) the last ones that are walked [n_max]: more edit more
    n_min: int = 0  # of these the last ones that sample the target as usual [n_min]: they change style and texture
    n_avg: int = 1  # noises over which the velocities are averaged at each step [n_avg]
    guidance_scale: float = 2.0  # classifier-free guidance under the target prompt
    source_guidance_scale: float = 1.0  # and under the source prompt
    num_samples: int = 1  # edits, each with noises of its own

    def __post_init__(self) -> None:
        check_invertible(self, counts=["n_max", "n_avg", "num_samples"])
        if not self.n_min <= self.n_max <= self.sampler.steps:
            values = f"n_min={self.n_min}, n_max={self.n_max} and sampler.steps={self.sampler.steps}"
            raise InputError(f"method.{values}: they must not fall in this order")

    def edit(self, model, task, z: Tensor, run: Run) -> Iterator[Result]:
        trajectory = self.sampler.trajectory(model.schedule).as_flow()
        as_source = guided(model, task.source_prompt, self.source_guidance_scale, task.negative_prompt)
        as_target = guided(model, task.prompt, self.guidance_scale, task.negative_prompt)
        as_source, as_target = (as_velocity(denoise, model.schedule) for denoise in (as_source, as_target))
        steps, sigmas, draws = len(trajectory), trajectory.levels.tolist(), z.expand(self.n_avg, -1, -1, -1)
        for i in range(self.num_samples):
            x, noise = z, run.noise("path", i)
            for n in run.progress("editing")(range(steps - self.n_max, steps - self.n_min)):
                t = trajectory.timesteps[n].item()
                z_src = torch.lerp(z, noise_like(draws, noise), sigmas[n])
                v = as_target(x + z_src - z, t) - as_source(z_src, t)
                x = trajectory.step(x, v.mean(dim=0, keepdim=True), n, n + 1)
                x = x if trajectory.kept is None else torch.lerp(z, x, trajectory.kept[1])  # outside there is no edit
            if self.n_min:
                x = x - z + torch.lerp(z, noise_like(z, noise), sigmas[steps - self.n_min])
                x = ddim.sample(as_target, x, trajectory.tail(self.n_min / steps))
            yield {"n_max": self.n_max, "guidance_scale": float(self.guidance_scale), "sample": i}, x
        yield RECONSTRUCTION, z
