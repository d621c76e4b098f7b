"""Prompt-to-Prompt (Hertz et al., 2022, arXiv 2208.01626) on inverted images ("Real image editing").

DDIM inverts the image under the source prompt. Then two branches are sampled side by side from the inverted latent,
one under the source and one under the target prompt, and the attention of the second is edited by that of the first
(algorithm 1): while the layout is laid down, each word looks where its counterpart looks (cross-attention), and each
place looks where it looked (self-attention). `null_contexts` and `rectified` are where later methods differ, which
make the source branch return to the image: null-text, negative-prompt and PnP inversion.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby

import torch
from einops import repeat
from torch import Tensor

from errors import InputError
from methods.base import (
    Edit,
    EditResult,
    Reporter,
    check,
    check_choice,
    check_invertible,
    cosine,
    frozen,
    source_latent,
    to_image,
)
from models.attention import Hook, attention, attention_map
from samplers import Sampler, ddim, guided

# Larger self-attention maps are left alone, as in the code of null-text inversion and of PnP inversion;
# Prompt-to-Prompt's own stops at 16**2.
SELF_PLACES = 32**2


@dataclass
class PromptToPrompt:
    """The settings. conf/method/prompt_to_prompt.yaml says what each one does and its symbol. Raises InputError for
    one that is out of range, and for a sampler that is not DDIM without noise."""

    sampler: Sampler
    guidance_scale: float = 2.0
    words: str = "replace"  # replace | refine
    cross_replace: float = 0.8  # of the steps
    self_replace: float = 0.5  # of the steps
    reweight: Mapping[str, float] | None = None  # of the target prompt's words
    fixed_point_steps: int = 0

    def __post_init__(self) -> None:
        check(self, "guidance_scale")
        check(self, "cross_replace", "self_replace", high=1)
        check(self, "fixed_point_steps", whole=True)
        check_choice(self, ("replace", "refine"), "words")
        check_invertible(self)
        if self.guidance_scale == 0:
            raise InputError("method.guidance_scale is 0: the prompts, whose attention is edited, would have no say")
        factors = {} if self.reweight is None else self.reweight
        named = isinstance(factors, Mapping)
        if not named or not all(type(c) in (int, float) and math.isfinite(c) for c in factors.values()):
            raise InputError(f"method.reweight is {self.reweight}: it must name words and factors, such as {{blue: 2}}")

    def edit(self, model, task, reporter: Reporter = Reporter(), seed: int = 0) -> EditResult:
        """One edit; the reconstruction is the source branch. Raises InputError if the task has no source prompt, or
        if `reweight` names a word that the prompt does not have."""
        if not task.source_prompt:
            raise InputError('this method needs source_prompt, what the picture shows now: source_prompt="a red heart"')
        trajectory = self.sampler.trajectory(model.schedule)
        steps = len(trajectory)
        tables = [
            *word_map(model.text, task.source_prompt, task.prompt, self.words),
            word_factors(model.text, task.prompt, self.reweight or {}),
        ]
        with frozen(model), torch.no_grad():
            z_0 = source_latent(model, task.image)
            source, target, null = (model.encode_text([text]) for text in (task.source_prompt, task.prompt, ""))
            with reporter.stage("inversion"):
                bar = lambda numbers: reporter.progress(numbers, "inversion", steps)
                recording = ddim.record(guided(model, source), z_0, trajectory, self.fixed_point_steps, bar)
            nulls = self.null_contexts(model, task, source, null, recording, trajectory, reporter)
            with reporter.stage("editing"):
                x = repeat(recording.latent, "1 ... -> branch ...", branch=2)  # source, target
                prompts = torch.cat([source, target])
                tables = [table.to(x.device) for table in tables]
                for i in reporter.progress(range(steps), "editing", steps):
                    if i == 0 or nulls[i] is not nulls[i - 1]:  # a denoiser projects its texts once
                        denoise = guided(model, prompts, nulls[i], self.guidance_scale)
                    with model.unet.attention.hooked(self.control(i / steps, *tables, model.unet.attention.backend)):
                        eps = denoise(x, int(trajectory.timesteps[i]))
                    x = ddim.step(x, eps, trajectory.alpha_bars[i], trajectory.alpha_bars[i + 1])
                    x = self.rectified(x, recording.latents[i + 1])
                again, z = x.split(1)
                settings = {"cross_replace": float(self.cross_replace), "self_replace": float(self.self_replace)}
                edit = Edit(to_image(model, z), settings, {"edit_source_cosine": cosine(z, z_0)})
            with reporter.stage("reconstruction"):
                reconstruction = to_image(model, again)
        metrics = {"reconstruction_error": float((again - z_0).square().mean().sqrt())}
        tensors = {"source_latent": z_0, "inverted_latent": recording.latent, "edited_latents": z}
        return EditResult([edit], reconstruction, metrics, tensors)

    def null_contexts(self, model, task, source, null, recording, trajectory, reporter) -> Sequence[Tensor]:
        """What guidance leads away from at each step, in the order of sampling: steps times (1, L, C), as are the text
        states `source` and `null`, of the source and the empty prompt."""
        return [null] * len(trajectory)

    def rectified(self, x: Tensor, recorded: Tensor) -> Tensor:
        """The branches' latents after a step, x (2, c, h, w); `recorded` is what the inversion passed there."""
        return x

    def control(self, done: float, words: Tensor, own: Tensor, factors: Tensor, backend: str = "auto") -> Hook:
        """Edit(M_t, M*_t, t) of algorithm 1, for the step after a share `done` of them: what the attention layers give
        for batches that end in (source, target), both with their text; what comes before, without it, is left alone.

        cross-attention, in the first `cross_replace`: the target's maps become (M_t words + M*_t own) factors;
        self-attention, in the first `self_replace`: the target's become the source's, by its queries and keys.
        """

        def hook(q: Tensor, k: Tensor, v: Tensor, cross: bool) -> Tensor | None:
            if cross and done < self.cross_replace:
                out = attention(q, k, v, backend)
                of_source, of_target = attention_map(q[-2:], k[-2:])  # (heads, N, L)
                edited = (of_source @ words + of_target * own) * factors
                out[-1] = edited @ v[-1].float()
                return out
            if not cross and done < self.self_replace and q.shape[-2] <= SELF_PLACES:
                q, k = (torch.cat([x[:-1], x[-2:-1]]) for x in (q, k))
                return attention(q, k, v, backend)
            return None

        return hook


def word_map(text, source: str, target: str, words: str) -> tuple[Tensor, Tensor]:
    """Which source tokens' maps a target token takes, (L, L), and whether it keeps its own, (L,), both float32.

    Tokens that both prompts have are aligned (the paper's A, here by the longest common runs), and padding with
    padding. New tokens keep their own maps, "adding a new phrase"; but with words="replace", those that stand where the
    source has others take theirs, "word swap": word by word where both sides have as many, and evenly spread where
    n tokens give place to m.
    """
    a, b = tokens(text, [source, target])
    word_of = word_numbers(text, source), word_numbers(text, target)
    takes, own = torch.zeros(len(a), len(b)), torch.ones(len(b))

    def pair(i: Sequence[int], j: Sequence[int]) -> None:
        takes[i[0] : i[-1] + 1, j[0] : j[-1] + 1] = torch.eye(len(i)) if len(i) == len(j) else 1 / len(j)
        own[j[0] : j[-1] + 1] = 0

    for kind, i, i_end, j, j_end in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        spans = range(i, i_end), range(j, j_end)
        if kind == "equal":
            pair(*spans)
        elif kind == "replace" and words == "replace":
            split = [[list(g) for _, g in groupby(s, n.__getitem__)] for s, n in zip(spans, word_of, strict=True)]
            for parts in zip(*split, strict=True) if len(split[0]) == len(split[1]) else [spans]:
                pair(*parts)
    return takes, own


def word_factors(text, prompt: str, reweight: Mapping[str, float]) -> Tensor:
    """The factor c of each token's map, "attention re-weighting": (L,). Raises InputError for a word, or
    words, that the prompt does not have."""
    (ids,) = tokens(text, [prompt])
    factors = torch.ones(len(ids))
    for phrase, factor in reweight.items():
        (wanted,) = tokens(text, [str(phrase)])
        wanted = wanted[1 : wanted.index(text.end)]
        places = [n for n in range(len(ids)) if wanted and ids[n : n + len(wanted)] == wanted]
        if not places:
            raise InputError(f"method.reweight names {phrase}, which is not in the prompt: {prompt}")
        for n in places:
            factors[n : n + len(wanted)] = factor
    return factors


def tokens(text, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids, each prompt's as long as the context. Without warnings, which encoding the prompts gives already."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return text.tokenize(prompts).tolist()


def word_numbers(text, prompt: str) -> list[int]:
    """The number of the word (between spaces) that each token belongs to; -1 for begin, end and padding."""
    words = [ids.index(text.end) - 1 for ids in tokens(text, prompt.split())]
    numbers = [-1, *(n for n, count in enumerate(words) for _ in range(count))]
    return (numbers + [-1] * text.context_length)[: text.context_length]
