"""Negative-prompt inversion (Miyake et al., 2023, arXiv 2305.16807), edited by Prompt-to-Prompt.

The null text that null-text inversion would find is nearly the source prompt. With that in the place of the empty one,
guidance vanishes in the source branch, eps = eps_source + w (eps_source - eps_source), which then walks the inversion's
path back whatever w is. So nothing is optimised.
"""

from collections.abc import Sequence

from torch import Tensor

from methods.prompt_to_prompt import PromptToPrompt


class NegativePrompt(PromptToPrompt):
    """The settings are Prompt-to-Prompt's. The reconstruction is as exact as DDIM inversion without guidance."""

    def null_contexts(self, model, task, source, null, recording, trajectory, reporter) -> Sequence[Tensor]:
        return [source] * len(trajectory)
