"""Null-text inversion (Mokady et al., 2022, arXiv 2211.09794, algorithm 1)."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from errors import InputError
from methods.base import Run
from methods.inversion import Inversion, Source
from methods.optimisation import cached_stage
from samplers import Conditioning, Trajectory, guided


@dataclass
class NullText(Inversion):
    """From the top down, the embedding of the empty prompt is optimised at each step, such that sampling with guidance
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
