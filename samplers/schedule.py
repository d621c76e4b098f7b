"""Noise schedules and the grids that are walked on them.

Notation of Ho et al. (2020, arXiv 2006.11239): x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps. All
arithmetic of alpha_bars is done in float64 on the CPU; a tensor meets only the finished coefficient, in its own dtype.
"""

import copy
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from errors import InputError

KINDS = ("scaled_linear", "linear", "cosine")
SPACINGS = ("leading", "trailing", "linspace")
ENDS = ("first", "one")


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One grid, walked down by sampling and up by inversion, so the two can never disagree.

    timesteps:  (steps,) int64, descending, for the network.
    alpha_bars: (steps + 1,) float64. alpha_bars[i] belongs to timesteps[i]; step i goes from alpha_bars[i] down to
                alpha_bars[i + 1], and alpha_bars[-1] is the clean end.
    kept:       None, or (z, inside): see `NoiseSchedule.confined`.
    """

    timesteps: Tensor
    alpha_bars: Tensor
    kept: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.timesteps)

    def step(self, x: Tensor, prediction: Tensor, i: int, j: int) -> Tensor:
        """Take x (B, ...) from noise level i to level j, either way, along the prediction eps made at level i or j.

        With x = alpha x0 + sigma eps: x_j = a x_i + b eps, where a = alpha_j / alpha_i and b = sigma_j - a sigma_i.
        """
        a = math.sqrt(self.alpha_bars[j] / self.alpha_bars[i])
        b = math.sqrt(1 - self.alpha_bars[j]) - a * math.sqrt(1 - self.alpha_bars[i])  # what cancels does so in float64
        return a * x + b * prediction

    def tail(self, share: float) -> "Trajectory":
        """The last `share` in [0, 1] of the steps, at least one: the walk from a half-noised image, as in SDEdit."""
        start = len(self) - max(1, round(share * len(self)))
        return replace(self, timesteps=self.timesteps[start:], alpha_bars=self.alpha_bars[start:])

    def confine(self, x: Tensor, lower: Tensor, i: int) -> Tensor:
        """Put the outside of `lower`, where step i led from x, back onto the path that leads from x to the kept z:
        alpha z + sigma n at either level, with the noise n that x has."""
        if self.kept is None:
            return lower
        (z, inside), a = self.kept, self.alpha_bars[i]
        n = (x - math.sqrt(a) * z) / math.sqrt(1 - a)
        return torch.lerp(self.step(x, n, i, i + 1), lower, inside)


@dataclass
class NoiseSchedule:
    """alpha_bar_t for t = 0 .. timesteps - 1, and what follows from it. The defaults are Stable Diffusion's.

    kind:             "linear" betas (Ho et al.); "scaled_linear", linear in their square root (Stable Diffusion); or
                      "cosine" (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17), without beta_start and beta_end.
    steps_offset:     added to every timestep of a "leading" grid; Stable Diffusion uses 1.
    final_alpha_bar:  where a walk ends: "first", on alpha_bar_0 (Stable Diffusion), or "one", without noise.
    """

    kind: str = "scaled_linear"
    timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    steps_offset: int = 1
    final_alpha_bar: str = "first"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"unknown noise schedule {self.kind!r}: choose one of {', '.join(KINDS)}")
        if self.final_alpha_bar not in ENDS:
            raise InputError(f"unknown final_alpha_bar {self.final_alpha_bar!r}: choose one of {', '.join(ENDS)}")
        self.alpha_bars = torch.cumprod(1 - self._betas(), dim=0)  # (timesteps,) float64, strictly decreasing
        self.kept = None

    def confined(self, z: Tensor, inside: Tensor) -> "NoiseSchedule":
        """This schedule with trajectories on which `ddim.walk` comes to the latent z (1, c, h, w) wherever `inside`
        (1, 1, h, w) is 0, from any start and whatever the steps; where it is 1, it is free. Inversion is not bound."""
        schedule = copy.copy(self)
        schedule.kept = z, inside
        return schedule

    def _betas(self) -> Tensor:
        exact = {"dtype": torch.float64, "device": "cpu"}  # a model may be built on the meta device
        if self.kind == "cosine":
            time = torch.arange(self.timesteps + 1, **exact) / self.timesteps
            alpha_bar = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
            return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)  # the last would leave no signal
        if self.kind == "linear":
            return torch.linspace(self.beta_start, self.beta_end, self.timesteps, **exact)
        return torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.timesteps, **exact) ** 2

    def trajectory(self, steps: int = 50, spacing: str = "leading", offset: int | None = None) -> Trajectory:
        """A descending grid of `steps` timesteps, 1 <= steps <= T, with the alpha_bar of each and of the end.

        With T timesteps (Lin et al. 2023, arXiv 2305.08891, table 2):
          leading   0, T//steps, 2 (T//steps), ..., each plus `offset` or steps_offset: starts a stride below full
                    noise. Where the offset would leave the schedule (steps = T), the whole grid is lowered to fit.
          trailing  T - 1 down in strides of T / steps: starts at full noise, ends a stride above clean.
          linspace  T - 1 down to 0, evenly. With final_alpha_bar="first" its last step changes nothing.
        Raises InputError for a step count out of range, or an unknown spacing.
        """
        T = self.timesteps
        if not isinstance(steps, int) or not 1 <= steps <= T:
            raise InputError(f"sampler.steps is {steps}: it must be a whole number from 1 to {T}")
        if spacing not in SPACINGS:
            raise InputError(f"sampler.spacing is {spacing}: choose one of {', '.join(SPACINGS)}")
        if spacing == "leading":
            stride = T // steps
            offset = min(self.steps_offset if offset is None else offset, T - 1 - stride * (steps - 1))
            ascending = [i * stride + offset for i in range(steps)]
        elif spacing == "trailing":
            ascending = [round((i + 1) * T / steps) - 1 for i in range(steps)]
        else:  # a single step starts from noise too, hence at T - 1
            ascending = [round(i * (T - 1) / (steps - 1)) for i in range(steps)] if steps > 1 else [T - 1]
        timesteps = torch.tensor(ascending[::-1], device="cpu")
        end = self.alpha_bars[:1] if self.final_alpha_bar == "first" else torch.ones_like(self.alpha_bars[:1])
        return Trajectory(timesteps, torch.cat([self.alpha_bars[timesteps], end]), self.kept)

    def _coefficients(self, t: int | Tensor, x: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t): floats for an int, tensors that multiply `x` by sample for (B,).
        The tables go to x's device, because reading a GPU's t would make the CPU wait for it."""
        if isinstance(t, int):
            return math.sqrt(self.alpha_bars[t]), math.sqrt(1 - self.alpha_bars[t])
        tables, shape = (self.alpha_bars.sqrt(), (1 - self.alpha_bars).sqrt()), (-1, *[1] * (x.ndim - 1))
        return tuple(table.to(x.dtype).to(x.device)[t.to(x.device)].reshape(shape) for table in tables)

    def add_noise(self, x0: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        """Draw from q(x_t | x0), given the noise (Ho et al., eq. 4). x0, noise (B, ...); t an int or (B,)."""
        a, s = self._coefficients(t, x0)
        return a * x0 + s * noise

    def eps_from_v(self, x: Tensor, v: Tensor, t: int | Tensor) -> Tensor:
        """The noise that v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 implies, exact at every t. Salimans & Ho
        2022, arXiv 2202.00512, app. D. x, v (B, ...); t an int or (B,)."""
        a, s = self._coefficients(t, x)
        return a * v + s * x


def noise_like(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal noise of x's shape, dtype and device. It is drawn in float32 where the generator lives, so that a
    CPU generator gives every device and every dtype the same noise."""
    device = generator.device if generator is not None else "cpu"
    return torch.randn(x.shape, generator=generator, device=device, dtype=torch.float32).to(x)
