"""Inversions: the source branch, beside which an editor such as Prompt-to-Prompt works.

Each inverts by DDIM under the source prompt, without guidance. They differ in how guided sampling comes back.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from errors import InputError
from methods.base import Run, check
from models.attention import CrossAttention
from samplers import Conditioning, Denoiser, Trajectory, ddim, guided


@dataclass
class Source:
    """The source branch of an edit: the inversion's path, and the way back along it."""

    trajectory: Trajectory  # the grid of both ways
    path: ddim.Inversion  # of one picture
    text: Conditioning  # the source prompt, one row
    nulls: Sequence[Conditioning]  # what guidance leads away from, a row each: one for all steps, or one for each
    rectified: bool = False  # whether the branch is put back onto the path after each step

    def sample(
        self,
        model,
        prompt: str,
        scale: float,
        control: Callable[[int], AbstractContextManager],
        run: Run,
        away: Conditioning | None = None,
        blend: Callable[[int, Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sample the source branch and, beside it, a branch under the target prompt, from the same latent.

        `control(i)` surrounds the network's call at step i, whose batch is (source, target), or under guidance (null,
        null, source, target). Both are led away from the same nulls; or the target from `away`, and then the source
        branch is guided only where it has a null for each step, which was made for that, and the batch has all four.
        `blend(i, x)` may replace both latents (2, c, h, w) after step i. Returns the reconstruction and the edit.
        """
        prompts = Conditioning.cat([self.text, model.encode_text([prompt])])
        own = scale if len(self.nulls) > 1 else 1.0
        scales = scale if away is None else self.path.latent.new_tensor([own, scale]).view(2, 1, 1, 1)
        steps = {t: i for i, t in enumerate(self.trajectory.timesteps.tolist())}

        @lru_cache(maxsize=1)  # for its projected texts take memory
        def denoiser(null: int) -> Denoiser:
            nulls = Conditioning.cat([self.nulls[null], self.nulls[null] if away is None else away])
            return guided(model, prompts, scales, nulls)

        def denoise(x: Tensor, t: float) -> Tensor:
            with control(steps[t]):
                return denoiser(min(steps[t], len(self.nulls) - 1))(x, t)

        def after(i: int, x: Tensor) -> Tensor:
            x = torch.cat([self.path.latents[i + 1], x[1:]]) if self.rectified else x
            return x if blend is None else blend(i, x)

        x = torch.cat([self.path.latent, self.path.latent])
        x = ddim.sample(denoise, x, self.trajectory, progress=run.progress("editing"), callback=after)
        again, edit = x.split(1)
        run.metrics["reconstruction_error"] = float((again - self.path.latents[-1]).square().mean().sqrt())
        return again, edit


@dataclass
class Inversion:
    """DDIM inversion (Song, Meng & Ermon, 2020, arXiv 2010.02502, eq. 13 backwards). Guidance leaves its path."""

    group = "inversion"  # its settings on the command line

    fixed_point_steps: int = 0  # further network calls per step of the inversion, which make it exact

    def __post_init__(self) -> None:
        check(self)

    def invert(self, model, task, z: Tensor, trajectory: Trajectory, guidance_scale: float, run: Run) -> Source:
        """Invert z (1, c, h, w), float64, under `task.source_prompt`; `guidance_scale` is that of the sampling."""
        if not any(isinstance(layer, CrossAttention) for layer in model.unet.modules()):
            raise InputError("this method edits the attention of a UNet, and this model's text and picture share one")
        text = model.encode_text([task.source_prompt])
        path = ddim.invert(guided(model, text), z, trajectory, self.fixed_point_steps, run.progress("inversion"))
        run.tensors["inverted_latent"] = path.latent
        return Source(trajectory, path, text, [model.encode_text([task.negative_prompt])])


@dataclass
class NegativePrompt(Inversion):
    """Negative-prompt inversion (Miyake et al., 2023, arXiv 2305.16807, eq. 9).

    The null text that null-text inversion finds is nearly the source prompt. With that in the place of the empty one,
    guidance vanishes in the source branch, eps_source + w (eps_source - eps_source), whatever w is. The
    task's negative prompt has no place left, and is not used.
    """

    def invert(self, *args) -> Source:
        source = super().invert(*args)
        return replace(source, nulls=[source.text])


@dataclass
class PnP(Inversion):
    """PnP inversion, "direct inversion in three lines" (Ju et al., 2023, arXiv 2310.01506, algorithm 1).

    After each step the source branch is corrected by its distance to the path, and the target branch is left alone:
    o = z*_{t-1} - DDIM(z_t, t, source), and z_{t-1} = DDIM(z_t, t, source) + o, which is z*_{t-1}.
    """

    def invert(self, *args) -> Source:
        return replace(super().invert(*args), rectified=True)
