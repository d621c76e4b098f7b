"""Conditioning, and classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) in one batched call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, float], Tensor]  # t is an int, or under a flow schedule a float


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

    def expand(self, images: int) -> Conditioning:
        """One row for each of `images`, from one row or from as many; another number is torch's RuntimeError."""
        return self.map(lambda x: x.expand(images, *x.shape[1:]))

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """All rows of `parts`, in their order."""
        vector = None if parts[0].vector is None else torch.cat([part.vector for part in parts])
        return Conditioning(torch.cat([part.states for part in parts]), vector)


def guided(model, text: str | Conditioning, scale: float | Tensor = 1.0, null: str | Conditioning = "") -> Denoiser:
    """Make the denoiser null + scale * (text - null), by one call of the network on the batch [null; text].

    model: has `encode_text`, `project` and `predict`, as `models.LatentDiffusion`.
    text, null: a prompt, or a Conditioning of one row for all images or of one row each. Scale 1 runs the text branch
    alone and scale 0 the null branch alone, each on x itself; a tensor of scales, (B, 1, 1, 1), always runs both.

    The keys and values of the text depend on neither x nor t: they are projected once per batch size and kept. Build
    a new denoiser after a change of the weights. Where states require grad, the network gets the text as it is at every
    call, so that each call has a graph of its own.
    """
    alone = not isinstance(scale, Tensor) and scale in (0, 1)
    branches = [text if scale == 1 else null] if alone else [null, text]
    branches = [model.encode_text([branch]) if isinstance(branch, str) else branch for branch in branches]

    def joined(images: int) -> Conditioning:
        return Conditioning.cat([branch.expand(images) for branch in branches])

    learning = any(branch.states.requires_grad for branch in branches)
    context = joined if learning else cache(lambda images: model.project(joined(images)))

    def denoise(x: Tensor, t: float) -> Tensor:
        if alone:
            return model.predict(x, t, context(len(x)))
        of_null, of_text = model.predict(torch.cat([x, x]), t, context(len(x))).chunk(2)
        return of_null + scale * (of_text - of_null)

    return denoise


def as_velocity(denoise: Denoiser, schedule) -> Denoiser:
    """The denoiser on `Trajectory.as_flow`: the velocity noise - x0, where epsilon of (alpha + sigma) x implies x0."""
    if schedule.kind == "flow":
        return denoise

    def velocity(x: Tensor, t: float) -> Tensor:
        alpha, sigma = schedule.mixture(t, x)
        return (alpha + sigma) / alpha * (denoise((alpha + sigma) * x, t) - x)

    return velocity
