"""Flow matching (Lipman et al. 2023, arXiv 2210.02747), with the straight paths of rectified flow (Liu et al. 2023,
arXiv 2209.03003): x_sigma = (1 - sigma) x0 + sigma noise, and the network predicts the velocity noise - x0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from errors import InputError

from .schedule import Schedule, Trajectory


@dataclass
class FlowSchedule(Schedule):
    """sigma from 1 (noise) to 0 (clean); the network's timestep is `timesteps` sigma, a float.

    shift: s of sigma <- s sigma / (1 + (s - 1) sigma), which spends more of the path at high noise (Esser et al. 2024,
           arXiv 2403.03206, eq. 23). Stable Diffusion 3 has 3; 1 is without.
    """

    kind: str = "flow"
    timesteps: int = 1000
    shift: float = 3.0

    def shifted(self, sigma: Tensor) -> Tensor:
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def trajectory(self, steps: int = 50, *_) -> Trajectory:
        """The published grid, which is the only one: evenly spaced from the shifted 1 to the shifted
        1 / timesteps, shifted once more, and 0. Raises InputError for a step count out of range."""
        if not isinstance(steps, int) or not 1 <= steps <= self.timesteps:
            raise InputError(f"sampler.steps is {steps}: it must be a whole number from 1 to {self.timesteps}")
        ends = self.shifted(torch.tensor([1, 1 / self.timesteps], dtype=torch.float64, device="cpu")).tolist()
        sigmas = self.shifted(torch.linspace(*ends, steps, dtype=torch.float64, device="cpu"))
        levels = torch.cat([sigmas, torch.zeros_like(sigmas[:1])])
        return Trajectory(self.timesteps * sigmas, levels, flow=True, kept=self.kept)

    def add_noise(self, x0: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
        """(1 - sigma) x0 + sigma noise at sigma = t / timesteps. x0, noise (B, ...); t a number or (B,)."""
        sigma = t / self.timesteps
        if isinstance(t, Tensor):
            sigma = sigma.to(x0).reshape(-1, *[1] * (x0.ndim - 1))
        return (1 - sigma) * x0 + sigma * noise

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Timesteps (n,) for a training loss, float32: logit-normal sigmas (Esser et al., section 3.1), shifted."""
        normal = torch.randn(n, generator=generator, device=generator.device)
        return self.timesteps * self.shifted(normal.sigmoid())

    def target(self, x0: Tensor, noise: Tensor) -> Tensor:
        """The prediction that a perfect network makes of x0 noised with `noise`: the velocity."""
        return noise - x0
