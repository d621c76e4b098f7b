"""The words of two prompts, as Prompt-to-Prompt pairs them: which token takes whose attention, and how strongly."""

import warnings
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from errors import InputError


class Tokens(NamedTuple):
    """A prompt's token ids and, for each, the number of its word (between spaces); -1 for begin, end and padding. Both
    are as long as the text encoder's context; the first `length` are not padding."""

    ids: list[int]
    words: list[int]
    length: int


def tokenise(text, prompt: str) -> Tokens:
    """Tokenise a prompt, and its words one by one to count their tokens."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the text encoder gives them
        ids, *alone = text.tokenize([prompt, *prompt.split()]).tolist()
    words = [number for number, word in enumerate(alone) for _ in range(word.index(text.end) - 1)]
    return Tokens(ids, [-1, *words, *[-1] * len(ids)][: len(ids)], ids.index(text.end) + 1)


def align(a: Sequence[int], b: Sequence[int]) -> list[tuple[int, int]]:
    """Give the places (i, j) of the equal tokens that a global alignment pairs, in order (Needleman & Wunsch, 1970).

    A match scores 1, a mismatch -1 and a gap 0, so unequal tokens are never paired. Of several best alignments it is
    the one that leaves out tokens of b first, from the end, as in Prompt-to-Prompt's code.
    """
    score = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            score[i + 1][j + 1] = max(score[i + 1][j], score[i][j + 1], score[i][j] + (1 if x == y else -1))
    i, j, pairs = len(a), len(b), []
    while i and j:
        if score[i][j] == score[i][j - 1]:
            j -= 1
        elif score[i][j] == score[i - 1][j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            pairs.append((i, j))
    return pairs[::-1]


def word_map(source: Tokens, target: Tokens, words: str) -> tuple[Tensor, Tensor]:
    """Give the source tokens whose maps each target token takes, (L, L), and whether it keeps its own, (L,), float32.

    Tokens that both prompts have are aligned (the paper's A), and padding with the padding at its place. New tokens
    keep their own maps, "adding a new phrase"; but with words="replace", those that stand where the source has others
    take theirs, "word swap": word by word where both have as many, and else n tokens' maps spread evenly over m.
    """
    takes, own = torch.zeros(len(source.ids), len(target.ids)), torch.ones(len(target.ids))

    def pair(i: Sequence[int], j: Sequence[int]) -> None:
        takes[i[0] : i[-1] + 1, j[0] : j[-1] + 1] = torch.eye(len(i)) if len(i) == len(j) else 1 / len(j)
        own[j[0] : j[-1] + 1] = 0

    pairs = align(source.ids[: source.length], target.ids[: target.length])
    for i, j in [*pairs, *((n, n) for n in range(max(source.length, target.length), len(own)))]:
        pair([i], [j])
    for (i, j), (i_end, j_end) in pairwise(pairs) if words == "replace" else ():
        spans = range(i + 1, i_end), range(j + 1, j_end)
        if all(spans):
            numbers = source.words, target.words
            split = [[list(g) for _, g in groupby(s, n.__getitem__)] for s, n in zip(spans, numbers, strict=True)]
            for parts in zip(*split, strict=True) if len(split[0]) == len(split[1]) else [spans]:
                pair(*parts)
    return takes, own


def places(text, prompt: Tokens, phrase: str) -> list[int]:
    """The places of all tokens of a word, or a phrase, wherever the prompt has it."""
    found = tokenise(text, phrase)
    ids = found.ids[1 : found.length - 1]
    starts = [n for n in range(prompt.length) if ids and prompt.ids[n : n + len(ids)] == ids]
    return [n + k for n in starts for k in range(len(ids))]


def word_factors(text, prompt: Tokens, reweight: Mapping[str, float]) -> Tensor:
    """Factors c of the tokens' maps, "attention re-weighting": (L,). Raises InputError for words the prompt lacks."""
    factors = torch.ones(len(prompt.ids))
    for phrase, factor in reweight.items():
        found = places(text, prompt, str(phrase))
        if not found:
            raise InputError(f"method.reweight names {phrase}, which is not in the prompt")
        factors[found] = factor
    return factors
