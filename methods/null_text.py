"""Null-text inversion (Mokady et al., 2022, arXiv 2211.09794), edited by Prompt-to-Prompt.

DDIM inversion without guidance gives a pivot, the path z*_T ... z*_0. Then, from the top down, the embedding of the
empty prompt is optimised at each step such that sampling with guidance stays on that path (algorithm 1).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errors import InputError
from methods.base import cached_stage, check
from methods.prompt_to_prompt import PromptToPrompt
from samplers import ddim, guided


@dataclass
class NullText(PromptToPrompt):
    """The settings, beside Prompt-to-Prompt's. conf/method/null_text.yaml says what each one does and its symbol."""

    inner_steps: int = 10
    null_lr: float = 1e-2
    stop_loss: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "inner_steps", whole=True)
        check(self, "null_lr", "stop_loss")

    def null_contexts(self, model, task, source, null, recording, trajectory, reporter) -> Sequence[Tensor]:
        """Algorithm 1: for t = T ... 1, `inner_steps` times, null_t <- null_t - lr grad || z*_{t-1} - z_{t-1}(z_t,
        null_t, source) ||^2; the next step begins with what was found. Raises InputError if the loss is not finite.

        As in the authors' code: Adam; the learning rate falls to half over the steps; a step's loop ends early once
        the mean square is below `stop_loss`, which rises by 2e-5 a step. Theirs updates first and checks afterwards,
        and gives Adam the mean over elements, not the sum, whose gradients are so small that Adam's eps of 1e-8 damps
        the updates.
        """
        if self.guidance_scale == 1:  # there is nothing for it to guide
            return [null] * len(trajectory)
        steps, w = len(trajectory), self.guidance_scale

        def build() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            as_source = guided(model, source)
            z, found, nulls, losses = recording.latent, null.float(), [], []
            for i in reporter.progress(range(steps), "null_text", steps):
                t, a, b = int(trajectory.timesteps[i]), trajectory.alpha_bars[i], trajectory.alpha_bars[i + 1]
                pivot, eps_source = recording.latents[i + 1], as_source(z, t)
                found = found.detach().clone().requires_grad_()
                adam = torch.optim.Adam([found], self.null_lr * (1 - i / (2 * steps)))
                for n in range(self.inner_steps + 1):
                    with torch.enable_grad():
                        eps_null = guided(model, found.to(source))(z, t)
                        lower = ddim.step(z, eps_null + w * (eps_source - eps_null), a, b)
                        loss = (pivot - lower).square().sum()
                    error = float(loss) / z.numel()
                    if not math.isfinite(error):
                        raise InputError(f"the loss of the null text is not finite at step {i}: lower method.null_lr")
                    if n == self.inner_steps or error < self.stop_loss + i * 2e-5:
                        break
                    adam.zero_grad()
                    loss.backward()
                    adam.step()
                z = lower.detach()
                losses.append(error)
                del eps_null, lower, loss  # the last pass's graph, which the next step's would else lie beside
                reporter.scalar("null_text", i, loss=losses[-1])
                nulls.append(found.detach().to(model.dtype))
            return {"nulls": torch.stack(nulls)}, {"loss": torch.tensor(losses)}

        key = {"method": "null_text", "source_prompt": task.source_prompt, "timesteps": trajectory.timesteps.tolist()}
        key |= {"guidance_scale": w, "fixed_point_steps": self.fixed_point_steps}
        key |= {"inner_steps": self.inner_steps, "null_lr": self.null_lr, "stop_loss": self.stop_loss}
        found, _ = cached_stage(reporter, "null_text", key, build)
        return found["nulls"].to(source)
