"""Prompt-to-Prompt (Hertz et al., 2022, arXiv 2208.01626) on inverted pictures ("Real image editing").

An inversion gives a source branch, which returns to the picture. A second branch under the target prompt is sampled
beside it, and its attention is edited by that of the first (algorithm 1). While the layout is laid down, each word
looks where its counterpart looks (cross-attention), and each place looks where it looked (self-attention).
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from errors import InputError
from methods.base import RECONSTRUCTION, Method, Result, Run, check, check_invertible
from methods.inversion import Inversion
from models.attention import CrossAttention, Hook, attention, attention_map
from samplers import Sampler

# Larger self-attention maps are left alone, as in the code of null-text inversion and of PnP inversion;
# Prompt-to-Prompt's own stops at 16**2.
SELF_PLACES = 32**2


@dataclass
class PromptToPrompt(Method):
    """The reconstruction is the source branch. A task needs a source prompt."""

    sampler: Sampler  # DDIM without noise: steps both ways
    inversion: Inversion  # the source branch: ddim | null_text | negative_prompt | pnp
    guidance_scale: float = 2.0  # classifier-free guidance [w]; 1 is without
    words: str = "replace"  # words in the place of others: replace (take their attention) | refine (keep their own)
    cross_replace: float = 0.8  # [tau] share of the steps in which cross-attention is that of the source's words
    self_replace: float = 0.5  # share of the steps in which self-attention is the source's
    reweight: dict[str, float] | None = None  # [c] factors for words of the prompt, such as {blue: 2}, in those steps

    def __post_init__(self) -> None:
        check(self, shares=["cross_replace", "self_replace"], words=["replace", "refine"])
        check_invertible(self)
        if self.guidance_scale == 0:
            raise InputError("method.guidance_scale is 0: the prompts, whose attention is edited, would have no say")
        factors = self.reweight or {}
        if not isinstance(factors, Mapping) or not all(isinstance(c, int | float) for c in factors.values()):
            raise InputError(f"method.reweight is {factors}: it must give words and their factors, such as {{blue: 2}}")

    def edit(self, model, task, z: Tensor, run: Run) -> Iterator[Result]:
        if not task.source_prompt:
            raise InputError('this method needs source_prompt, a caption of the picture: source_prompt="a red heart"')
        if not any(isinstance(layer, CrossAttention) for layer in model.unet.modules()):
            raise InputError("Prompt-to-Prompt edits maps of cross-attention, and this network has none")
        trajectory = self.sampler.trajectory(model.schedule)
        source = self.inversion.invert(model, task, z, trajectory, self.guidance_scale, run)
        source_words, words = tokenise(model.text, task.source_prompt), tokenise(model.text, task.prompt)
        takes, own = word_map(source_words, words, self.words)
        tables = [table.to(z.device) for table in (takes, own, word_factors(model.text, words, self.reweight or {}))]

        def control(i: int):
            return model.unet.attention.hooked(self.edited(i / len(trajectory), *tables, model.unet.attention.backend))

        target = model.encode_text([task.prompt])
        again, edit = source.sample(model, target, self.guidance_scale, control, run)
        yield {"cross_replace": float(self.cross_replace), "self_replace": float(self.self_replace)}, edit
        yield RECONSTRUCTION, again

    def edited(self, done: float, takes: Tensor, own: Tensor, factors: Tensor, backend: str = "auto") -> Hook:
        """Edit(M_t, M*_t, t) of algorithm 1, for the step after a share `done` of them: the results of the attention
        layers for batches that end in (source, target), both with their text. Rows before these are left alone.

        cross-attention, in the first `cross_replace`: the target's maps become (M_t takes + M*_t own) factors;
        self-attention, in the first `self_replace`: the target's become the source's, by its queries and keys.
        """

        def hook(q: Tensor, k: Tensor, v: Tensor, cross: bool) -> Tensor | None:
            if cross and done < self.cross_replace:
                out = attention(q, k, v, backend)
                of_source, of_target = attention_map(q[-2:], k[-2:])  # (heads, N, L)
                out[-1] = ((of_source @ takes + of_target * own) * factors) @ v[-1].float()
                return out
            if not cross and done < self.self_replace and q.shape[-2] <= SELF_PLACES:
                q, k = (torch.cat([x[:-1], x[-2:-1]]) for x in (q, k))
                return attention(q, k, v, backend)
            return None

        return hook


class Tokens(NamedTuple):
    """A prompt's token ids and, for each, the number of its word (between spaces); -1 for begin, end and padding. Both
    are as long as the text encoder's context."""

    ids: list[int]
    words: list[int]


def tokenise(text, prompt: str) -> Tokens:
    """Tokenise a prompt, and its words one by one to count their tokens."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the text encoder gives them
        ids, *alone = text.tokenize([prompt, *prompt.split()]).tolist()
    words = [number for number, word in enumerate(alone) for _ in range(word.index(text.end) - 1)]
    return Tokens(ids, [-1, *words, *[-1] * len(ids)][: len(ids)])


def word_map(source: Tokens, target: Tokens, words: str) -> tuple[Tensor, Tensor]:
    """Give the source tokens whose maps each target token takes, (L, L), and whether it keeps its own, (L,), float32.

    Tokens that both prompts have are aligned (the paper's A, here by the longest common runs), and padding with
    padding. New tokens keep their own maps, "adding a new phrase"; but with words="replace", those that stand where the
    source has others take theirs, "word swap": word by word where both sides have as many, and evenly spread where
    n tokens give place to m.
    """
    takes, own = torch.zeros(len(source.ids), len(target.ids)), torch.ones(len(target.ids))

    def pair(i: Sequence[int], j: Sequence[int]) -> None:
        takes[i[0] : i[-1] + 1, j[0] : j[-1] + 1] = torch.eye(len(i)) if len(i) == len(j) else 1 / len(j)
        own[j[0] : j[-1] + 1] = 0

    for kind, i, i_end, j, j_end in SequenceMatcher(None, source.ids, target.ids, autojunk=False).get_opcodes():
        spans = range(i, i_end), range(j, j_end)
        if kind == "equal":
            pair(*spans)
        elif kind == "replace" and words == "replace":
            numbers = source.words, target.words
            split = [[list(g) for _, g in groupby(s, n.__getitem__)] for s, n in zip(spans, numbers, strict=True)]
            for parts in zip(*split, strict=True) if len(split[0]) == len(split[1]) else [spans]:
                pair(*parts)
    return takes, own


def word_factors(text, prompt: Tokens, reweight: Mapping[str, float]) -> Tensor:
    """Give the factor c of each token's map, "attention re-weighting": (L,). Raises InputError for a word, or a phrase,
    that the prompt lacks."""
    factors = torch.ones(len(prompt.ids))
    for phrase, factor in reweight.items():
        ids = tokenise(text, str(phrase)).ids
        ids = ids[1 : ids.index(text.end)]
        places = [n for n in range(len(prompt.ids)) if ids and prompt.ids[n : n + len(ids)] == ids]
        if not places:
            raise InputError(f"method.reweight names {phrase}, which is not in the prompt")
        for n in places:
            factors[n : n + len(ids)] = factor
    return factors
