"""Inversions: the source branch, beside which an editor such as Prompt-to-Prompt works.

Each inverts the picture by DDIM under its source prompt, without guidance. They differ in the way in which sampling
with guidance then comes back to the picture.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from errors import InputError
from methods.base import Run, cached_stage, check
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
        `blend(i, x)` may replace both latents (2, c, h, w) after step i. Returns the reconstruction and the edit,
        latents (1, c, h, w).
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
    """DDIM inversion (Song, Meng & Ermon, 2020, arXiv 2010.02502, eq. 13 backwards). Sampling leads away from the empty
    prompt, so guidance leaves the path."""

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


@dataclass
class NullText(Inversion):
    """Null-text inversion (Mokady et al., 2022, arXiv 2211.09794, algorithm 1).

    From the top down, the embedding of the empty prompt is optimised at each step, such that sampling with guidance
    stays on the path. A pooled vector, where the model has one, stays the empty prompt's.
    """

    inner_steps: int = 10  # [N] optimisation steps for each step of sampling, at most; 0 keeps the empty prompt
    null_lr: float = 1e-2  # [eta] their learning rate, which falls to half over the sampling
    stop_loss: float = 1e-5  # mean square error of the latent that ends them; rises by 2e-5 with each step of sampling

    def invert(self, model, task, z: Tensor, trajectory: Trajectory, guidance_scale: float, run: Run) -> Source:
        source = super().invert(model, task, z, trajectory, guidance_scale, run)
        if guidance_scale == 1:  # the null text has no weight
            return source
        null = source.nulls[0]
        key = {name: getattr(task, name) for name in ("source_prompt", "negative_prompt")}
        key |= {"method": "null_text", "timesteps": trajectory.timesteps.tolist()}
        key |= {"guidance_scale": guidance_scale, **vars(self)}
        stored = cached_stage(run, "null_text", key, lambda: self.optimise(model, source, guidance_scale, run))
        return replace(source, nulls=[Conditioning(states, null.vector) for states in stored["nulls"].to(null.states)])

    def optimise(self, model, source: Source, w: float, run: Run) -> tuple[dict, dict]:
        """For t = T ... 1, `inner_steps` times: null_t <- null_t - lr grad ||z*_{t-1} - z_{t-1}(z_t, null_t, text)||^2.
        The next step begins with the null text that this one found. Returns {"nulls": (steps, 1, L, C)} and
        {"loss": (steps,)}. Raises InputError for a loss that is not finite.

        The authors' code checks after an update, not before, and gives Adam the mean over elements, not the sum; those
        gradients are so small that Adam's eps of 1e-8 damps the updates.
        """
        trajectory, as_source, null = source.trajectory, guided(model, source.text), source.nulls[0]
        steps, z, states, nulls, losses = len(trajectory), source.path.latent, null.states.float(), [], []
        for i in run.progress("null_text")(range(steps)):
            t, pivot = trajectory.timesteps[i].item(), source.path.latents[i + 1]
            eps_source = as_source(z, t)
            states = states.detach().clone().requires_grad_()
            adam = torch.optim.Adam([states], self.null_lr * (1 - i / (2 * steps)))
            for n in range(self.inner_steps + 1):
                with torch.enable_grad():
                    eps_null = guided(model, Conditioning(states.to(null.states), null.vector))(z, t)
                    lower = trajectory.step(z, eps_null + w * (eps_source - eps_null), i, i + 1)
                    loss = (pivot - lower).square().sum()
                error = loss.item() / z.numel()
                if not math.isfinite(error):
                    raise InputError(f"the loss of the null text is not finite at step {i}: lower inversion.null_lr")
                if n == self.inner_steps or error < self.stop_loss + i * 2e-5:
                    break
                adam.zero_grad()
                loss.backward()
                adam.step()
            z = lower.detach()
            losses.append(error)
            nulls.append(states.detach().to(null.states))
            run.scalar("null_text", i, loss=error)
            del eps_null, lower, loss  # the graph, which would lie in memory beside the next step's
        return {"nulls": torch.stack(nulls)}, {"loss": losses}
