"""The step of DDPM's ancestral sampling (Ho, Jain & Abbeel 2020, arXiv 2006.11239) on any sub-grid of the schedule.

The betas of a sub-grid follow from consecutive alpha_bars (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 19).
"""

import math

from torch import Tensor

VARIANCES = ("posterior", "fixed_large")


def step(
    x: Tensor,
    eps: Tensor,
    alpha_bar_from: float,
    alpha_bar_to: float,
    variance: str = "posterior",
    noise: Tensor | None = None,
) -> Tensor:
    """Draw from p(x_to | x_from): the posterior q(x_to | x_from, x0) at the x0 that eps implies. Eq. 6, 7, 11.

    With alpha = alpha_bar_from / alpha_bar_to and beta = 1 - alpha the variance is
      posterior    (1 - alpha_bar_to) / (1 - alpha_bar_from) * beta, exact for data that is a single point ("fixed
                   small" in Ho et al.'s code);
      fixed_large  beta, exact for data that is standard normal.
    The former makes it DDIM's step with eta 1.
    x, eps, noise: (B, ...); 0 < alpha_bar_from <= alpha_bar_to <= 1, numbers or 0-dim tensors. `noise` is a standard
    normal draw; without one the mean is returned.
    """
    a, b = float(alpha_bar_from), float(alpha_bar_to)
    alpha, beta = a / b, 1 - a / b
    mean = (x - beta / math.sqrt(1 - a) * eps) / math.sqrt(alpha)
    if noise is None:
        return mean
    sigma2 = beta if variance == "fixed_large" else (1 - b) / (1 - a) * beta
    return mean + math.sqrt(sigma2) * noise
