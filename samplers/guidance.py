"""Conditioning, and classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) in one batched call.

Turns a conditional network into a denoiser, the plain callable (x, t) -> prediction that every sampler takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import repeat
from torch import Tensor

Denoiser = Callable[[Tensor, "int | Tensor"], Tensor]


@dataclass(frozen=True)
class Conditioning:
    """One value for all that a text gives a network: `states` (B, L, C) and, in families that have one, a pooled
    `vector` (B, D). Sums and multiples act on both, so `eta * a + (1 - eta) * b` interpolates."""

    states: Tensor
    vector: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> Conditioning:
        """The chosen rows; a single one keeps its batch dimension."""
        rows = [rows] if isinstance(rows, int) else rows
        return self.map(lambda x: x[rows])

    def __add__(self, other: Conditioning) -> Conditioning:
        vector = None if self.vector is None else self.vector + other.vector
        return Conditioning(self.states + other.states, vector)

    def __mul__(self, factor: float) -> Conditioning:
        return self.map(lambda x: factor * x)

    __rmul__ = __mul__

    def map(self, f: Callable[[Tensor], Tensor]) -> Conditioning:
        """f of the states, and of the vector where there is one."""
        return Conditioning(f(self.states), None if self.vector is None else f(self.vector))

    def to(self, *args: Any) -> Conditioning:
        """Both tensors as by `Tensor.to`."""
        return self.map(lambda x: x.to(*args))

    def expand(self, images: int) -> Conditioning:
        """One row for each of `images`, from one row or from as many. Raises ValueError for another number."""
        if len(self) not in (1, images):
            raise ValueError(f"a conditioning of {len(self)} rows cannot guide a batch of {images} images")
        return self.map(lambda x: x.expand(images, *x.shape[1:]))

    @property
    def requires_grad(self) -> bool:
        return self.states.requires_grad or (self.vector is not None and self.vector.requires_grad)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """All rows of `parts`, in their order."""
        vectors = [part.vector for part in parts]
        return Conditioning(
            torch.cat([part.states for part in parts]), None if vectors[0] is None else torch.cat(vectors)
        )


def guided(model, text: str | Conditioning, scale: float = 1.0, null: str | Conditioning = "") -> Denoiser:
    """Make the denoiser null + scale * (text - null), by one call of the network on the batch [null; text].

    model: has `encode_text`, `project` and `predict`, as `models.LatentDiffusion`.
    text, null: a prompt, or a Conditioning of one row for all images or of one row each. Scale 1 runs the text branch
    alone and scale 0 the null branch alone, each on a batch of B.

    The keys and values of the text depend on neither x nor t: they are projected once per batch size and kept. Build
    a new denoiser after a change of the weights. A conditioning that requires grad is handed to the network as it is
    at every call, so that each call has a graph of its own.
    Raises ValueError where a conditioning has another number of rows than the batch.
    """
    if isinstance(text, str) and scale != 0:
        text = model.encode_text([text])
    if isinstance(null, str) and scale != 1:
        null = model.encode_text([null])
    branches = {1: [text], 0: [null]}.get(scale, [null, text])
    learning = any(branch.requires_grad for branch in branches)
    projected: dict[int, Any] = {}  # by the number of images

    def conditioning(images: int) -> Any:
        if learning:
            return Conditioning.cat([branch.expand(images) for branch in branches])
        if images not in projected:
            projected[images] = model.project(Conditioning.cat([branch.expand(images) for branch in branches]))
        return projected[images]

    def denoise(x: Tensor, t: int | Tensor) -> Tensor:
        batch = repeat(x, "b ... -> (branch b) ...", branch=len(branches))
        if isinstance(t, Tensor) and t.ndim == 1:
            t = repeat(t, "b -> (branch b)", branch=len(branches))
        predictions = model.predict(batch, t, conditioning(len(x))).chunk(len(branches))
        if len(branches) == 1:
            return predictions[0]
        return predictions[0] + scale * (predictions[1] - predictions[0])

    return denoise
