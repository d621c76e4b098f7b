"""Prompt-to-Prompt (Hertz et al., 2022, arXiv 2208.01626) on inverted pictures ("Real image editing").

An inversion gives a source branch, which returns to the picture. A second branch under the target prompt is sampled
beside it, and its attention is edited by that of the first (algorithm 1). While the layout is laid down, each word
looks where its counterpart looks (cross-attention), and each place looks where it looked (self-attention). With a pair
of words to blend, the rest of the picture stays the source's.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errors import MOST, InputError, check_number
from methods.base import RECONSTRUCTION, Method, Result, Run, check_invertible
from methods.inversion import Inversion
from methods.local_blend import LocalBlend
from methods.words import Tokens, places, tokenise, word_factors, word_map
from models.attention import Hook, attention, attention_map
from samplers import Sampler

# Larger self-attention maps are left alone, as by the code of null-text and PnP inversion; Prompt-to-Prompt's: 16**2.
SELF_PLACES = 32**2


@dataclass
class PromptToPrompt(Method):
    """The reconstruction is the source branch. A task needs a source prompt."""

    sampler: Sampler  # without noise (eta 0): steps both ways
    inversion: Inversion  # the source branch: ddim | null_text | negative_prompt | pnp
    guidance_scale: float = 2.0  # classifier-free guidance [w]; 1 is without
    words: str = "replace"  # words in the place of others: replace (take their attention) | refine (keep their own)
    cross_replace: float = 0.4  # [tau] share of the steps in which cross-attention is that of the source's words
    self_replace: float = 0.2  # share of the steps in which self-attention is the source's
    reweight: dict[str, float] | None = None  # [c] factors for words of the prompt, such as {blue: 2}, in those steps
    blend_word: str = ""  # "cat dog", the source's word and the target's: only near them is edited; lists bring theirs
    blend_weight: float = 2.0  # [c] the factor of the target's one
    blend_start: float = 0.2  # share of the steps before blending
    blend_threshold: float = 0.3  # [k] share of a word's strongest attention above which a place is near it

    def __post_init__(self) -> None:
        shares = ["cross_replace", "self_replace", "blend_start", "blend_threshold"]
        check_invertible(self, shares=shares, words=["replace", "refine"])
        if self.guidance_scale == 0:
            raise InputError("method.guidance_scale is 0: the prompts, whose attention is edited, would have no say")
        if not isinstance(factors := self.reweight or {}, Mapping):
            raise InputError(f"method.reweight is {factors}: it must give words and their factors, such as {{blue: 2}}")
        for word, factor in factors.items():
            check_number(f"method.reweight.{word}", factor, low=-MOST)

    def edit(self, model, task, z: Tensor, run: Run) -> Iterator[Result]:
        if not task.source_prompt:
            raise InputError('this method needs source_prompt, a caption of the picture: source_prompt="a red heart"')
        trajectory = self.sampler.trajectory(model.schedule)
        source_words, words = tokenise(model.text, task.source_prompt), tokenise(model.text, task.prompt)
        takes, own = word_map(source_words, words, self.words)
        factors, near = word_factors(model.text, words, self.reweight or {}), torch.zeros(2, len(words.ids))
        if pair := (task.blend_word or self.blend_word).split():
            near = blended_words(model.text, source_words, words, pair)
            factors *= torch.where(near[1] > 0, self.blend_weight, 1.0)
        tables = [table.to(z.device) for table in (takes, own, factors)]
        sides = [2 * side // model.unet.downsampling for side in z.shape[-2:]]
        start = int(self.blend_start * len(trajectory))
        blend = LocalBlend(near.to(z.device), sides, start, self.blend_threshold) if pair else None
        source = self.inversion.invert(model, task, z, trajectory, self.guidance_scale, run)
        layers = model.unet.attention
        control = lambda i: layers.hooked(self.edited(i / len(trajectory), tables, layers.backend, blend))
        again, edit = source.sample(model, task.prompt, self.guidance_scale, control, run, blend=blend)
        yield {"cross_replace": float(self.cross_replace), "self_replace": float(self.self_replace)}, edit
        yield RECONSTRUCTION, again

    def edited(
        self, done: float, tables: Sequence[Tensor], backend: str = "auto", blend: LocalBlend | None = None
    ) -> Hook:
        """Edit(M_t, M*_t, t) of algorithm 1, for the step after a share `done` of them: the results of the attention
        layers for batches that end in (source, target), both with their text. Rows before these are left alone.

        cross-attention, in the first `cross_replace`: the target's maps become (M_t takes + M*_t own) factors;
        self-attention, in the first `self_replace`: the target's become the source's, by its queries and keys.
        `tables` are takes (L, L), own (L,) and factors (L,). `blend` collects the maps as they are used.
        """

        def hook(q: Tensor, k: Tensor, v: Tensor, cross: bool) -> Tensor | None:
            replaced, collected = done < self.cross_replace, blend is not None and blend.collects(q.shape[-2])
            if cross and (replaced or collected):
                maps, out = attention_map(q[-2:], k[-2:]), attention(q, k, v, backend)  # (2, heads, N, L)
                if replaced:
                    takes, own, factors = tables
                    maps[1] = (maps[0] @ takes.to(maps.dtype) + maps[1] * own) * factors
                    out[-1] = maps[1] @ v[-1].to(maps.dtype)
                if collected:
                    blend.collect(maps)
                return out
            if not cross and done < self.self_replace and q.shape[-2] <= SELF_PLACES:
                q, k = (torch.cat([x[:-1], x[-2:-1]]) for x in (q, k))
                return attention(q, k, v, backend)
            return None

        return hook


def blended_words(text, source: Tokens, target: Tokens, pair: list[str]) -> Tensor:
    """(2, L), 1 at the tokens of the pair's first word in the source prompt and of its second in the target prompt.
    Raises InputError unless they are two, and one is there; warns where the other is not."""
    near = torch.zeros(2, len(target.ids))
    for row, prompt, word in zip(near, (source, target), pair, strict=False):
        row[places(text, prompt, word)] = 1
    if len(pair) != 2 or not near.any():
        raise InputError(f'blend_word is "{" ".join(pair)}": a word of the source prompt and one of the prompt')
    for word in (word for word, row in zip(pair, near, strict=True) if not row.any()):
        warnings.warn(f"blend_word names {word}, which its prompt lacks", stacklevel=2)
    return near
