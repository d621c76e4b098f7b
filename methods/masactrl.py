"""MasaCtrl: tuning-free mutual self-attention control (Cao et al., 2023, arXiv 2304.08465) on inverted pictures.

The target prompt lays out a new picture; what fills it is looked up in the source branch. After the first steps, in the
later layers, the target's self-attention keeps its own queries and takes the source's keys and values (algorithm 1).
So a thing may change its pose and keeps its looks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import Tensor

from errors import MOST, check_number
from methods.base import RECONSTRUCTION, Method, Result, Run, check_invertible
from methods.inversion import Inversion
from models.attention import Hook, SelfAttention, attention
from samplers import Sampler


@dataclass
class MasaCtrl(Method):
    """The reconstruction is the source branch, which has the empty prompt, as in the authors' code for photographs."""

    sampler: Sampler  # without noise (eta 0): steps both ways
    inversion: Inversion  # the source branch: ddim | null_text | negative_prompt | pnp
    guidance_scale: float = 2.5  # classifier-free guidance [w]; 1 is without
    start_step: int = 4  # [S] the first step, counted from 0, whose attention is edited
    start_layer: int = 6  # [L] the first self-attention layer, counted from 0 in the order of execution

    def __post_init__(self) -> None:
        check_invertible(self)
        check_number("method.start_step", self.start_step, whole=True, high=self.sampler.steps - 1)

    def edit(self, model, task, z: Tensor, run: Run) -> Iterator[Result]:
        trajectory, layers = self.sampler.trajectory(model.schedule), model.unet.attention
        empty = replace(task, source_prompt="")
        own = sum(isinstance(module, SelfAttention) for module in model.unet.modules())  # 0: `invert` refuses
        check_number("method.start_layer", self.start_layer, whole=True, high=(own or MOST) - 1)  # beyond: no edit
        source = self.inversion.invert(model, empty, z, trajectory, self.guidance_scale, run)
        control = lambda i: layers.hooked(self.edited(i, layers.backend))
        again, edit = source.sample(model, task.prompt, self.guidance_scale, control, run)
        yield {"start_step": self.start_step, "start_layer": self.start_layer}, edit
        yield RECONSTRUCTION, again

    def edited(self, step: int, backend: str = "auto") -> Hook:
        """EDIT of algorithm 1 for one call of the network, whose batch has source and target in turn:

        {Q, K_s, V_s} from step S and layer L on, else {Q, K, V}.
        """
        layers = count()

        def hook(q: Tensor, k: Tensor, v: Tensor, cross: bool) -> Tensor | None:
            if cross or next(layers) < self.start_layer or step < self.start_step:
                return None
            k_source, v_source = (torch.repeat_interleave(x[::2], 2, dim=0) for x in (k, v))
            return attention(q, k_source, v_source, backend)

        return hook
