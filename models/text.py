"""Text conditioning and CLIP (Radford et al., 2021), on open_clip's own towers and tokenizer."""

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import InputError
from samplers import Conditioning

VOCABULARY = 49408  # entries of CLIP's tokenizer: 256 bytes, each inside and at the end of a word, merges, begin, end
BEGIN, END = VOCABULARY - 2, VOCABULARY - 1
UNKNOWN = 1  # every token that a compact vocabulary lacks: a row of its embedding, and an id that it never has


class TextEncoder(nn.Module):
    """Prompts to hidden states (B, L, C) of an open_clip text tower, and to a vector (B, D) where it gives one.

    `hidden_layer` is "last" (Stable Diffusion 1.x) or "penultimate"; its states pass the final layer norm, but for
    `final_norm` False (SDXL). `vector` is None, or the last layer's state at the end token, after that norm: "end", or
    "projected" by CLIP's projection (SDXL's second tower), not normalised. `pad_token` is an id, or "end" (SD 1.x).

    `vocabulary`, where given, lists in ascending order the tokenizer's ids that the tower knows; its embedding then has
    one row for each, behind a row for padding (0) and one for all other tokens (`UNKNOWN`), so that a small model
    carries no rows that were never trained. Without one, a tower of n embeddings knows the first n - 514 of the
    tokenizer's merges, and begins and ends prompts with n - 2 and n - 1. `added_tokens` are words of their own, such as
    textual inversion learns, and their ids, which follow the others."""

    def __init__(
        self,
        tower: nn.Module,
        hidden_layer: str = "last",
        pad_token: int | str = 0,
        vocabulary: Tensor | None = None,
        final_norm: bool = True,
        vector: str | None = None,
        added_tokens: Mapping[str, int] | None = None,
    ):
        super().__init__()
        known = hidden_layer in ("last", "penultimate") and vector in (None, "end", "projected")
        if not known or tower.context_length < 2:
            raise InputError(f"arch.text: {hidden_layer=}, {vector=} and context_length give no encoder")
        self.final_norm, self.vector, self.added_tokens = final_norm, vector, dict(added_tokens or {})
        if strange := [f"{word}={n}" for word, n in self.added_tokens.items() if n not in range(tower.vocab_size)]:
            raise InputError(f"the added tokens {', '.join(strange[:3])} have no row among {tower.vocab_size}")
        known = tower.vocab_size - len(self.added_tokens)
        size = min(known, VOCABULARY) if vocabulary is None else VOCABULARY  # extra rows are not tokens
        self.tower, self.context_length = tower, tower.context_length
        self.begin, self.end = size - 2, size - 1
        self.hidden_layer, self.pad_token = hidden_layer, self.end if pad_token == "end" else pad_token
        self.register_buffer("vocabulary", vocabulary)
        self._tokenizer = None
        self._known = None if vocabulary is None else set(vocabulary.tolist())

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> ids (B, context_length) on the CPU: begin, the prompt's tokens, end, padding. Too long a prompt is
        cut with a warning; words outside a compact vocabulary are named in one."""
        if self._tokenizer is None:
            import open_clip

            self._tokenizer = open_clip.SimpleTokenizer(context_length=self.context_length)
            ranks = self._tokenizer.bpe_ranks
            self._tokenizer.bpe_ranks = {pair: rank for pair, rank in ranks.items() if rank < self.begin - 512}
        ids = torch.full((len(prompts), self.context_length), self.pad_token, dtype=torch.long)
        room = self.context_length - 2
        added = "|".join(map(re.escape, sorted(self.added_tokens, key=len, reverse=True)))  # "<cat>_1" before "<cat>"
        for row, prompt in zip(ids, prompts, strict=True):
            tokens = []
            for piece in re.split(f"({added or '(?!)'})", prompt):
                tokens += [self.added_tokens[piece]] if piece in self.added_tokens else self._tokenizer.encode(piece)
            if len(tokens) > room:
                warnings.warn(f"the prompt has {len(tokens)} tokens and is cut to {room}: {prompt!r}", stacklevel=2)
                tokens = tokens[:room]
            if self._known is not None and (new := [t for t in tokens if t not in self._known]):
                words = ", ".join(dict.fromkeys(self._tokenizer.decode([t]).strip() for t in new))
                warnings.warn(f"this model has never seen: {words} (in the prompt {prompt!r})", stacklevel=2)
            row[: len(tokens) + 2] = torch.tensor([self.begin, *tokens, self.end])
        return ids

    def encode_tokens(self, ids: Tensor) -> Tensor:
        """Tokenizer ids (B, L) -> hidden states (B, L, C)."""
        return self.condition(ids).states

    def condition(self, ids: Tensor) -> Conditioning:
        """Tokenizer ids (B, L) -> hidden states (B, L, C), and the vector (B, D) or None."""
        tower = self.tower
        ids = ids.to(tower.positional_embedding.device)
        rows = ids if self.vocabulary is None else compact(ids, self.vocabulary)
        last = tower.token_embedding(rows) + tower.positional_embedding[: ids.shape[1]]
        mask = tower.attn_mask[: ids.shape[1], : ids.shape[1]].to(last.dtype)
        for block in tower.transformer.resblocks:
            states, last = last, block(last, attn_mask=mask)
        states = last if self.hidden_layer == "last" else states
        states = tower.ln_final(states) if self.final_norm else states
        if self.vector is None:
            return Conditioning(states)
        vector = self.at_end(tower.ln_final(last), ids)
        return Conditioning(states, vector @ tower.text_projection if self.vector == "projected" else vector)

    def forward(self, prompts: Sequence[str]) -> Conditioning:
        return self.condition(self.tokenize(prompts))

    def at_end(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """The states at the prompts' end tokens, the first of several: (B, L, C), (B, L) -> (B, C)."""
        end = (ids == self.end).int().argmax(dim=-1).to(hidden.device)
        return hidden[torch.arange(len(hidden), device=hidden.device), end]

    def pool(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """CLIP's text feature: the state at the end token, projected and normalised. (B, L, C), (B, L) -> (B, D)."""
        projection = self.tower.text_projection
        return F.normalize((self.at_end(hidden, ids).to(projection.dtype) @ projection).float(), dim=-1)


class TextTowers(nn.ModuleDict):
    """The text towers of a family, by their sections of the config ("text", "text_2"), and the rule for what they give:
    states and vectors are joined over channels, in that order. The empty prompt is encoded like any other, or with
    `zeros` (SDXL) its states and vector are 0.

    With `width` (SD3) the states are padded with zeros to that many channels, and those of T5, the tower "t5", follow
    them in the sequence; without T5, 256 zeros in their place."""

    def __init__(self, towers: Mapping[str, nn.Module], zeros: bool = False, width: int | None = None):
        super().__init__(towers)
        self.zeros, self.width = zeros, width

    def forward(self, prompts: Sequence[str]) -> Conditioning:
        given = [tower(prompts) for name, tower in self.items() if name != "t5"]
        vectors = [each.vector for each in given if each.vector is not None]
        states = torch.cat([each.states for each in given], -1)
        if self.width:
            states = F.pad(states, (0, self.width - states.shape[-1]))
            more = self["t5"](prompts).to(states) if "t5" in self else states.new_zeros(len(states), 256, self.width)
            states = torch.cat([states, more], dim=1)
        empty = torch.tensor([self.zeros and not prompt.strip() for prompt in prompts], device=states.device)
        joined = Conditioning(states, torch.cat(vectors, -1) if vectors else None)
        return joined.map(lambda x: x.masked_fill(empty.view(-1, *[1] * (x.ndim - 1)), 0))


def compact(ids: Tensor, vocabulary: Tensor) -> Tensor:
    """Tokenizer ids -> rows of a compact embedding: 0 (padding) stays, vocabulary[i] is i + 2, all others `UNKNOWN`."""
    index = torch.searchsorted(vocabulary, ids).clamp(max=len(vocabulary) - 1)
    rows = torch.where(vocabulary[index] == ids, index + 2, UNKNOWN)
    return torch.where(ids == 0, 0, rows)


def compact_vocabulary(texts: Sequence[str]) -> Tensor:
    """The sorted token ids that occur in `texts`, with begin and end: the `vocabulary` of a small `TextEncoder`."""
    import open_clip

    tokenizer = open_clip.SimpleTokenizer()
    ids = {t for text in texts for t in tokenizer.encode(text)} - {0, UNKNOWN}
    return torch.tensor(sorted(ids | {BEGIN, END}))


class Clip(nn.Module):
    """An image tower beside a text encoder, with the learned temperature: for contrastive training, losses and scores.
    Features are L2-normalised, (B, D), float32 with weights of any precision."""

    def __init__(self, visual: nn.Module, text: TextEncoder, image_size: int, mean=(0.5,) * 3, std=(0.5,) * 3):
        super().__init__()
        if text.hidden_layer != "last" or not text.final_norm:  # `pool` takes these states
            raise InputError("arch.vision: CLIP compares the text's last layer, so arch.text.hidden_layer must be last")
        self.visual, self.text, self.image_size = visual, text, image_size
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        # On the CPU even while the weights are on the meta device: no file will bring these.
        self.register_buffer("mean", torch.tensor(mean, device="cpu").view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, device="cpu").view(3, 1, 1), persistent=False)

    def image_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], of any size, resampled to the tower's; differentiable."""
        x = x.to(self.mean)
        if x.shape[-2:] != (self.image_size, self.image_size):
            x = F.interpolate(x, (self.image_size, self.image_size), mode="bicubic", antialias=True)
        x = ((x + 1) / 2 - self.mean) / self.std
        return F.normalize(self.visual(x.to(self.visual.conv1.weight)).float(), dim=-1)

    def token_features(self, ids: Tensor) -> Tensor:
        return self.text.pool(self.text.encode_tokens(ids), ids)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        return self.token_features(self.text.tokenize(prompts))


def build_text(
    width: int,
    heads: int,
    layers: int,
    context_length: int = 77,
    vocab_size: int = VOCABULARY,
    quick_gelu: bool = False,
    embed_dim: int | None = None,  # width of the CLIP projection, None for none
    vocabulary: Tensor | None = None,
    **how: Any,
) -> TextEncoder:
    """A text encoder of the given sizes; `how` it encodes is explained there."""
    from open_clip.transformer import QuickGELU, TextTransformer

    size = vocab_size if vocabulary is None else len(vocabulary) + 2
    activation = QuickGELU if quick_gelu else nn.GELU
    tower = TextTransformer(context_length, size, width, heads, layers, output_dim=embed_dim, act_layer=activation)
    with torch.device("cpu"):  # even while the weights are on the meta device: no file will bring the mask
        tower.attn_mask = tower.build_causal_mask()
    return TextEncoder(tower, vocabulary=vocabulary, **how)


def build_clip(text: TextEncoder, embed_dim: int, image_size: int, patch: int, **sizes: int) -> Clip:
    """`text` beside an open_clip vision transformer of the given sizes: `width`, `heads`, `layers`."""
    from open_clip.transformer import VisionTransformer

    return Clip(VisionTransformer(image_size, patch, mlp_ratio=4.0, output_dim=embed_dim, **sizes), text, image_size)


# Named sizes: the text tower of OpenAI's CLIP ViT-L/14 (Stable Diffusion 1.x); OpenCLIP's ViT-H/14 without its last
# layer (2.x), which has no part in the states of the second-to-last one; SDXL's two, the second OpenCLIP's ViT-bigG/14.
CLIP_L = dict(width=768, heads=12, layers=12, quick_gelu=True, hidden_layer="last", pad_token="end")
OPEN_CLIP_H = dict(width=1024, heads=16, layers=23, quick_gelu=False, hidden_layer="last", pad_token=0)
SDXL_CLIP_L = CLIP_L | dict(hidden_layer="penultimate", final_norm=False)
SDXL_BIG_G = dict(width=1280, heads=20, layers=32, quick_gelu=False, hidden_layer="penultimate", pad_token=0,
                  final_norm=False, vector="projected", embed_dim=1280)  # fmt: skip
