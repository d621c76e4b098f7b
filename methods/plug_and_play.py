"""Plug-and-Play diffusion features (Tumanyan et al., 2022, arXiv 2211.12572) on inverted pictures.

A source branch returns to the picture. In the early steps the target branch takes spatial features of its network,
which say what is where, and the queries and keys of its self-attention, which say which places belong together
(algorithm 1). So the layout stays, and the prompt decides the looks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor

from methods.base import RECONSTRUCTION, Method, Result, Run, check_invertible
from methods.inversion import Inversion
from models.attention import attention
from samplers import Sampler


@dataclass
class PlugAndPlay(Method):
    """The reconstruction is the source branch, which has no guidance but that of null-text inversion. The target leads
    away from the negative prompt, the task's or else that of the settings."""

    sampler: Sampler  # without noise (eta 0): steps both ways
    inversion: Inversion  # the source branch: ddim | null_text | negative_prompt | pnp
    guidance_scale: float = 2.5  # classifier-free guidance of the target [w]; 1 is without
    negative_prompt: str = ""  # where the task has none; the authors' code has one for photographs
    source_prompted: bool = False  # the source branch: false, under the empty prompt; true, under the source prompt
    feature_share: float = 0.4  # [tau_f] share of the steps in which features are the source's
    attention_share: float = 0.25  # [tau_A] share of the steps in which queries and keys are the source's

    def __post_init__(self) -> None:
        check_invertible(self, shares=["feature_share", "attention_share"])

    def edit(self, model, task, z: Tensor, run: Run) -> Iterator[Result]:
        away = model.encode_text([task.negative_prompt or self.negative_prompt])
        plain = replace(task, source_prompt=task.source_prompt if self.source_prompted else "", negative_prompt="")
        trajectory = self.sampler.trajectory(model.schedule)
        source = self.inversion.invert(model, plain, z, trajectory, self.guidance_scale, run)
        control = lambda i: self.injected(model.unet, i / len(trajectory))
        again, edit = source.sample(model, task.prompt, self.guidance_scale, control, run, away)
        shares = {"feature_share": float(self.feature_share), "attention_share": float(self.attention_share)}
        yield shares, edit
        yield RECONSTRUCTION, again

    @contextmanager
    def injected(self, unet, done: float) -> Iterator[None]:
        """Surround one call of the network, after a share `done` of the steps, on (null, null, source, target). Both of
        the target's rows get, of the source under its null, which is the empty prompt,

        f_t^4, the features, in the first `feature_share`;
        A_t^l = softmax(q k^T), by q and k, in the first `attention_share`, in all layers behind the features' block.
        """
        behind, of_source = False, lambda x: x[[0, 0, 2, 0]]

        def features(x: Tensor) -> Tensor | None:
            nonlocal behind
            behind = True
            return of_source(x) if done < self.feature_share else None

        def maps(q: Tensor, k: Tensor, v: Tensor, cross: bool) -> Tensor | None:
            if cross or not behind or done >= self.attention_share:
                return None
            return attention(of_source(q), of_source(k), v, unet.attention.backend)

        with unet.attention.hooked(maps), unet.features_hooked(features):
            yield
