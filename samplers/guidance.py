"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) in one batched call.

Turns a text-conditional network into a denoiser, the plain callable (x, t) -> eps that every sampler takes.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from einops import repeat
from torch import Tensor

Denoiser = Callable[[Tensor, int | Tensor], Tensor]


class NoisePredictor(Protocol):
    """What guidance needs of a model. `project_context(context)` is used too, where there is one."""

    def predict_noise(self, x: Tensor, t: int | Tensor, context: Any) -> Tensor: ...


def guided(model: NoisePredictor, context: Tensor, null_context: Tensor | None = None, scale: float = 1.0) -> Denoiser:
    """A denoiser: eps_null + scale * (eps_text - eps_null), by one call on the batch [null; text].

    context, null_context: (1, L, C), shared by all images, or (B, L, C), one for each. scale 1 runs the text
    branch alone and scale 0 the null branch alone, each on a batch of B; all but 1 need `null_context`.

    The network works in the contexts' precision, and eps comes in that of x.

    The text's keys and values depend on neither x nor t, so they are projected once per batch size and kept;
    build a new denoiser after changing the weights or the context in place. A context that requires grad is
    handed to the network as it is at every call, so that each call has a graph of its own.
    Raises ValueError where a context is missing, or is for another number of images.
    """
    if scale != 1 and null_context is None:
        raise ValueError(f"guidance at scale {scale} needs a null_context; only scale 1 does without")
    branches = {1: [context], 0: [null_context]}.get(scale, [null_context, context])
    learning = any(branch.requires_grad for branch in branches)
    project = None if learning else getattr(model, "project_context", None)
    projected: dict[int, Any] = {}  # by the number of images

    def batched_context(images: int) -> Any:
        for branch in branches:
            if len(branch) not in (1, images):
                raise ValueError(f"a context for {len(branch)} images cannot guide a batch of {images}")
        batch = torch.cat([branch.expand(images, -1, -1) for branch in branches])
        return project(batch) if project else batch

    def denoise(x: Tensor, t: int | Tensor) -> Tensor:
        images, z = len(x), x.to(branches[0].dtype)
        if learning:
            conditioning = batched_context(images)
        else:
            if images not in projected:
                projected[images] = batched_context(images)
            conditioning = projected[images]
        if len(branches) == 1:
            return model.predict_noise(z, t, conditioning).to(x.dtype)
        both = repeat(z, "b ... -> (branch b) ...", branch=2)
        if isinstance(t, Tensor) and t.ndim == 1:
            t = repeat(t, "b -> (branch b)", branch=2)
        eps_null, eps_text = model.predict_noise(both, t, conditioning).chunk(2)
        return (eps_null + scale * (eps_text - eps_null)).to(x.dtype)

    return denoise
