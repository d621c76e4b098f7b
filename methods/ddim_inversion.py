"""DDIM inversion with guidance (Song, Meng & Ermon, 2020, arXiv 2010.02502, section 4.3), the plainest baseline.

The deterministic path (eq. 12 with sigma 0, or as a step of an ODE, eq. 13) is walked up from the image under
the source prompt, and down again under the target prompt with classifier-free guidance. Nothing holds the result to
the image but the latent at the top.
"""

from dataclasses import dataclass
from functools import partial

import torch

from methods.base import Edit, EditResult, Reporter, check, check_invertible, cosine, source_latent, to_image
from samplers import Sampler, ddim, guided


@dataclass
class DDIMInversion:
    """The settings: see conf/method/ddim_inversion.yaml. Raises InputError for one that is out of range, and for a
    sampler that is not DDIM without noise."""

    sampler: Sampler
    guidance_scale: float = 2.0
    inversion_scale: float = 1.0
    fixed_point_steps: int = 0

    def __post_init__(self) -> None:
        check(self, "guidance_scale", "inversion_scale")
        check(self, "fixed_point_steps", whole=True)
        check_invertible(self)

    @torch.no_grad()
    def edit(self, model, task, reporter: Reporter = Reporter(), seed: int = 0) -> EditResult:
        """One edit. The reconstruction is the way down under the source prompt, with the guidance of the way up. A
        task without a source prompt is inverted under the empty one."""
        trajectory = self.sampler.trajectory(model.schedule)
        bar = partial(reporter.progress, total=len(trajectory))
        z_0 = source_latent(model, task.image)
        source, target, null = (model.encode_text([text]) for text in (task.source_prompt, task.prompt, ""))
        as_source = guided(model, source, null, self.inversion_scale)
        as_target = guided(model, target, null, self.guidance_scale)
        with reporter.stage("inversion"):
            upward = partial(bar, stage="inversion")
            z_T = ddim.invert(as_source, z_0, trajectory, self.fixed_point_steps, upward)
        with reporter.stage("editing"):
            z = ddim.sample(as_target, z_T, trajectory, progress=partial(bar, stage="editing"))
            settings = {"guidance_scale": float(self.guidance_scale)}
            edit = Edit(to_image(model, z), settings, {"edit_source_cosine": cosine(z, z_0)})
        with reporter.stage("reconstruction"):
            again = ddim.sample(as_source, z_T, trajectory)
            reconstruction = to_image(model, again)
        metrics = {"reconstruction_error": float((again - z_0).square().mean().sqrt())}
        tensors = {"source_latent": z_0, "inverted_latent": z_T, "edited_latents": z}
        return EditResult([edit], reconstruction, metrics, tensors)
