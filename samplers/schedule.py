"""Noise schedules and the grids that are walked on them.

Notation of Ho et al. (2020, arXiv 2006.11239): x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps. All
arithmetic of alpha_bars is done in float64 on the CPU; a tensor meets only the finished coefficient, in its own dtype.
"""

import copy
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from errors import InputError, check, check_number

KINDS = ("scaled_linear", "linear", "cosine")
SPACINGS = ("auto", "leading", "trailing")


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One grid, walked down by sampling and up by inversion, so the two can never disagree."""

    timesteps: Tensor  # (steps,) descending, for the network; int64, of a flow float64
    levels: Tensor  # (steps + 1,) float64: alpha_bars, of a flow sigmas; step i leads from levels[i] to levels[i + 1]
    flow: bool = False  # whether x = (1 - sigma) x0 + sigma noise and predictions are velocities, noise - x0
    kept: tuple[Tensor, Tensor] | None = None  # (z, inside): see `Schedule.confined`

    def __len__(self) -> int:
        return len(self.timesteps)

    def mixture(self, i: int) -> tuple[float, float]:
        """alpha and sigma of x = alpha x0 + sigma noise at level i; what cancels does so in float64."""
        level = float(self.levels[i])
        return (1 - level, level) if self.flow else (math.sqrt(level), math.sqrt(1 - level))

    def step(
        self, x: Tensor, prediction: Tensor, i: int, j: int, eta: float = 0.0, noise: Tensor | None = None
    ) -> Tensor:
        """Take x (B, ...) from noise level i to level j, either way, along the prediction made at level i or j:
        x_j = a x_i + (sigma_j - a sigma_i) prediction, with a = alpha_j / alpha_i for epsilon, and 1 for velocity.

        With eta in (0, 1] it goes down only, and not for a flow: the step draws, with the deviation of DDIM's eq. 16,
        from q(x_j | x_i, x0) at the x0 that epsilon implies (with 1, DDPM's posterior: Ho et al., eq. 7). `noise` is
        the standard normal draw; without one the mean is returned (DDIM, eq. 12)."""
        if self.flow and eta > 0:
            raise InputError("a flow is walked without noise: eta must be 0")
        (alpha, sigma), (alpha_to, sigma_to) = self.mixture(i), self.mixture(j)
        a = 1.0 if self.flow else alpha_to / alpha
        drawn = eta * sigma_to / sigma * math.sqrt(1 - (alpha / alpha_to) ** 2) if eta > 0 else 0.0
        sigma_to = math.sqrt(max(sigma_to**2 - drawn**2, 0.0)) if eta > 0 else sigma_to
        mean = a * x + (sigma_to - a * sigma) * prediction
        return mean if noise is None else mean + drawn * noise

    def tail(self, share: float) -> "Trajectory":
        """The last `share` in [0, 1] of the steps, at least one: the walk from a half-noised image, as in SDEdit."""
        start = len(self) - max(1, round(share * len(self)))
        return replace(self, timesteps=self.timesteps[start:], levels=self.levels[start:])

    def as_flow(self) -> "Trajectory":
        """The same grid for x / (alpha + sigma), a flow's x at sigma / (alpha + sigma), but ending clean. Sampling
        along it by `as_velocity` takes DDIM's path (Karras et al., 2022, arXiv 2206.00364, eq. 4)."""
        if self.flow:
            return self
        sigmas = 1 / (1 + (self.levels[:-1] / (1 - self.levels[:-1])).sqrt())
        return replace(self, levels=torch.cat([sigmas, 0 * sigmas[:1]]), flow=True)

    def confine(self, x: Tensor, lower: Tensor, i: int) -> Tensor:
        """Put the outside of `lower`, where step i led from x, back onto the path that leads from x to the kept z:
        alpha z + sigma n at either level, with the noise n that x has."""
        if self.kept is None:
            return lower
        (z, inside), (alpha, sigma) = self.kept, self.mixture(i)
        n = (x - alpha * z) / sigma
        return torch.lerp(self.step(x, n - z if self.flow else n, i, i + 1), lower, inside)


class Schedule:
    """What schedules share: noising, and a latent that walks keep to."""

    kept: ClassVar[tuple[Tensor, Tensor] | None] = None

    def confined(self, z: Tensor, inside: Tensor) -> "Schedule":
        """This schedule with trajectories on which `ddim.sample` comes to the latent z (1, c, h, w) wherever `inside`
        (1, 1, h, w) is 0, from any start and whatever the steps; where it is 1, it is free. Inversion is not bound."""
        schedule = copy.copy(self)
        schedule.kept = z, inside
        return schedule

    def add_noise(self, x0: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
        """alpha x0 + sigma noise, which draws from q(x_t | x0). x0, noise (B, ...); t a number or (B,)."""
        alpha, sigma = self.mixture(t, x0)
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor) -> Tensor:
        """The prediction that a perfect network makes of x0 noised with `noise`: epsilon, or the velocity."""
        return noise - x0 if self.kind == "flow" else noise


@dataclass
class NoiseSchedule(Schedule):
    """alpha_bar_t for t = 0 .. timesteps - 1, and what follows from it. The defaults are Stable Diffusion's."""

    group = "schedule"

    kind: str = "scaled_linear"  # betas: linear (Ho et al.) | scaled_linear, linear in their square root | cosine
    timesteps: int = 1000
    beta_start: float = 0.00085  # cosine (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17) has no ends
    beta_end: float = 0.012
    steps_offset: int = 1  # added to every timestep of a "leading" grid
    final_alpha_bar: str = "first"  # where a walk ends: first, on alpha_bar_0 | one, without noise
    # Rescaled so that the last alpha_bar is zero (Lin et al. 2023, arXiv 2305.08891, algorithm 1), or rather 2 ** -24,
    # since at zero epsilon is x itself, and a step along it would divide by zero.
    zero_snr: bool = False

    def __post_init__(self) -> None:
        check(self, ["beta_start", "beta_end"], ["timesteps"], kind=KINDS, final_alpha_bar=("first", "one"))
        self.alpha_bars = torch.cumprod(1 - self._betas(), dim=0)  # (timesteps,) float64, strictly decreasing
        if self.zero_snr:
            roots = self.alpha_bars.sqrt()
            self.alpha_bars = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square().clamp(min=2**-24)
        self.tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}  # of `mixture`

    def _betas(self) -> Tensor:
        exact = {"dtype": torch.float64, "device": "cpu"}  # a model may be built on the meta device
        if self.kind == "cosine":
            time = torch.arange(self.timesteps + 1, **exact) / self.timesteps
            alpha_bar = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
            return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)  # the last would leave no signal
        if self.kind == "linear":
            return torch.linspace(self.beta_start, self.beta_end, self.timesteps, **exact)
        return torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.timesteps, **exact) ** 2

    def trajectory(self, steps: int = 50, spacing: str = "auto", offset: int | None = None) -> Trajectory:
        """A descending grid of `steps` timesteps, 1 <= steps <= T, with the alpha_bar of each and of the end.

        With T timesteps (Lin et al. 2023, arXiv 2305.08891, table 2):
          auto      trailing under zero_snr, which was trained from pure noise down, else leading.
          leading   0, T//steps, 2 (T//steps), ..., each plus `offset` or steps_offset: starts a stride below full
                    noise. Where the offset would leave the schedule (steps = T), the whole grid is lowered to fit.
          trailing  T - 1 down in strides of T / steps: starts at full noise, ends a stride above clean.
        Raises InputError for a step count out of range.
        """
        T = self.timesteps
        check_number("sampler.steps", steps, whole=True, low=1, high=T)
        if spacing == "leading" or (spacing == "auto" and not self.zero_snr):
            stride = T // steps
            offset = min(self.steps_offset if offset is None else offset, T - 1 - stride * (steps - 1))
            ascending = [i * stride + offset for i in range(steps)]
        else:
            ascending = [round((i + 1) * T / steps) - 1 for i in range(steps)]
        timesteps = torch.tensor(ascending[::-1], device="cpu")
        end = self.alpha_bars[:1] if self.final_alpha_bar == "first" else torch.ones_like(self.alpha_bars[:1])
        return Trajectory(timesteps, torch.cat([self.alpha_bars[timesteps], end]), kept=self.kept)

    def mixture(self, t: int | Tensor, x: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """alpha = sqrt(alpha_bar_t), sigma = sqrt(1 - alpha_bar_t) (Ho et al., eq. 4): floats, tensors for t (B,)."""
        if isinstance(t, int):
            return math.sqrt(self.alpha_bars[t]), math.sqrt(1 - self.alpha_bars[t])
        if (x.device, x.dtype) not in self.tables:  # kept there, since reading a GPU's t would make the CPU wait for it
            tables = torch.stack([self.alpha_bars.sqrt(), (1 - self.alpha_bars).sqrt()])
            self.tables[x.device, x.dtype] = tables.to(x.dtype).to(x.device)
        return self.tables[x.device, x.dtype][:, t.to(x.device)].reshape(2, -1, *[1] * (x.ndim - 1)).unbind()

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Timesteps (n,) for a training loss, uniform, where the generator lives."""
        return torch.randint(self.timesteps, (n,), generator=generator, device=generator.device)

    def eps_from_v(self, x: Tensor, v: Tensor, t: int | Tensor) -> Tensor:
        """The noise that v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 implies, exact at every t. Salimans & Ho
        2022, arXiv 2202.00512, app. D. x, v (B, ...); t an int or (B,)."""
        alpha, sigma = self.mixture(t, x)
        return alpha * v + sigma * x


@dataclass
class FlowSchedule(Schedule):
    """Flow matching (Lipman et al. 2023, arXiv 2210.02747) along the straight paths of rectified flow (Liu et al. 2023,
    arXiv 2209.03003): x = (1 - sigma) x0 + sigma noise, sigma from 1 (noise) to 0 (clean), and the network predicts
    the velocity noise - x0. Its timestep is `timesteps` sigma, a float."""

    kind: str = "flow"
    timesteps: int = 1000
    # s of sigma <- s sigma / (1 + (s - 1) sigma), which spends more of the path at high noise (Esser et al. 2024, arXiv
    # 2403.03206, eq. 23). 1 is without.
    shift: float = 3.0

    def shifted(self, sigma: Tensor) -> Tensor:
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def trajectory(self, steps: int = 50, *_) -> Trajectory:
        """The published grid, which is the only one: evenly spaced from the shifted 1 to the shifted
        1 / timesteps, shifted once more, and 0. Raises InputError for a step count out of range."""
        check_number("sampler.steps", steps, whole=True, low=1, high=self.timesteps)
        ends = self.shifted(torch.tensor([1, 1 / self.timesteps], dtype=torch.float64, device="cpu")).tolist()
        sigmas = self.shifted(torch.linspace(*ends, steps, dtype=torch.float64, device="cpu"))
        levels = torch.cat([sigmas, torch.zeros_like(sigmas[:1])])
        return Trajectory(self.timesteps * sigmas, levels, flow=True, kept=self.kept)

    def mixture(self, t: float | Tensor, x: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """alpha = 1 - sigma and sigma = t / timesteps: numbers, or tensors that multiply `x` by sample for (B,)."""
        sigma = t / self.timesteps
        if isinstance(t, Tensor):
            sigma = sigma.to(x).reshape(-1, *[1] * (x.ndim - 1))
        return 1 - sigma, sigma

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Timesteps (n,) for a training loss, float32: logit-normal sigmas (Esser et al., section 3.1), shifted."""
        normal = torch.randn(n, generator=generator, device=generator.device)
        return self.timesteps * self.shifted(normal.sigmoid())


def noise_like(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal noise of x's shape, dtype and device. It is drawn in float32 where the generator lives, so that a
    CPU generator gives every device and every dtype the same noise."""
    device = generator.device if generator is not None else "cpu"
    return torch.randn(x.shape, generator=generator, device=device, dtype=torch.float32).to(x)
