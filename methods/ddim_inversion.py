"""DDIM inversion with guidance (Song, Meng & Ermon, 2020, arXiv 2010.02502, section 4.3), the plainest baseline.

The deterministic path (eq. 12 with sigma 0, or as a step of an ODE, eq. 13) is walked up from the picture under the
source prompt, and down again under the target prompt with guidance. Only the latent at the top ties the two.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from methods.base import RECONSTRUCTION, Method, Result, Run, check_invertible
from samplers import Sampler, ddim, guided


@dataclass
class DDIMInversion(Method):
    """The reconstruction is the way down under the source prompt, or the empty one, guided as the way up is."""

    sampler: Sampler  # without noise (eta 0): steps both ways
    guidance_scale: float = 2.0  # classifier-free guidance on the way down, under the prompt [w]; 1 is without
    inversion_scale: float = 1.0  # and on the way up, under the source prompt
    fixed_point_steps: int = 0  # further network calls per step of the inversion, which make it exact

    def __post_init__(self) -> None:
        check_invertible(self)

    def edit(self, model, task, z: Tensor, run: Run) -> Iterator[Result]:
        trajectory = self.sampler.trajectory(model.schedule)
        as_source = guided(model, task.source_prompt, self.inversion_scale, task.negative_prompt)
        as_target = guided(model, task.prompt, self.guidance_scale, task.negative_prompt)
        top = ddim.invert(as_source, z, trajectory, self.fixed_point_steps, run.progress("inversion")).latent
        run.tensors["inverted_latent"] = top
        edit = ddim.sample(as_target, top, trajectory, progress=run.progress("editing"))
        yield {"guidance_scale": float(self.guidance_scale)}, edit
        again = ddim.sample(as_source, top, trajectory)
        run.metrics["reconstruction_error"] = float((again - z).square().mean().sqrt())
        yield RECONSTRUCTION, again
