"""PnP inversion: direct inversion in three lines (Ju et al., 2023, arXiv 2310.01506), edited by Prompt-to-Prompt.

The inversion's latents z*_t are kept. Each step of sampling takes both branches to z_{t-1}; then the source branch is
corrected by its distance to the inversion, and the target branch is left alone (algorithm 1):

    o_{t-1} = z*_{t-1} - DDIM(z_source_t, t, source),    z_source_{t-1} = DDIM(z_source_t, t, source) + o_{t-1}

So the source branch, from which the target takes its attention, returns to the input exactly.
"""

import torch
from torch import Tensor

from methods.prompt_to_prompt import PromptToPrompt


class PnPInversion(PromptToPrompt):
    """The settings are Prompt-to-Prompt's."""

    def rectified(self, x: Tensor, recorded: Tensor) -> Tensor:
        return torch.cat([recorded, x[1:]])  # z + (z* - z), without the rounding
