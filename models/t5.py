"""The encoder of T5 v1.1 (Raffel et al. 2020, arXiv 1910.10683; gated as in Shazeer 2020), for Stable Diffusion 3."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from errors import InputError

BUCKETS, FURTHEST = 32, 128  # of the distances between tokens


class Block(nn.Module):
    """x + softmax(q kᵀ + bias) v, without 1/√d, then x + wo(gelu_tanh(wi_0 y) wi_1 y); each on the normalised input, no
    biases: (B, L, width) and (1, heads, L, L) -> (B, L, width)."""

    def __init__(self, width: int, heads: int, head_width: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.to_qkv = nn.Linear(width, 3 * heads * head_width, bias=False)
        self.to_out = nn.Linear(heads * head_width, width, bias=False)
        self.wi_0 = nn.Linear(width, hidden, bias=False)
        self.wi_1 = nn.Linear(width, hidden, bias=False)
        self.wo = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = rearrange(self.to_qkv(self.norm1(x)), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        out = F.scaled_dot_product_attention(q, k, v, bias, scale=1.0)
        x = x + self.to_out(rearrange(out, "b h n d -> b n (h d)"))
        y = self.norm2(x)
        return x + self.wo(F.gelu(self.wi_0(y), approximate="tanh") * self.wi_1(y))


class T5(nn.Module):
    """Prompts to states (B, context_length, width), padding included: Stable Diffusion 3 masks nothing.

    float16 overflows in it: it works in bfloat16 or float32. `tokenizer` is a sentencepiece model; ids need none."""

    def __init__(
        self,
        width: int = 4096,
        layers: int = 24,
        heads: int = 64,
        head_width: int = 64,
        hidden: int = 10240,
        vocab_size: int = 32128,
        context_length: int = 256,
    ):
        super().__init__()
        self.width, self.context_length, self.tokenizer = width, context_length, None
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_bias = nn.Embedding(BUCKETS, heads)  # by buckets of distance; all layers share it
        self.blocks = nn.ModuleList(Block(width, heads, head_width, hidden) for _ in range(layers))
        self.norm_out = nn.RMSNorm(width, eps=1e-6)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> ids (B, context_length) on the CPU: the tokens, the end (1), padding (0). Raises InputError where
        there is no tokenizer, or no library for it."""
        if self.tokenizer is None:
            raise InputError("T5 has no tokenizer: give model.tokenizer=PATH, the spiece.model of a hub folder")
        ids = torch.zeros(len(prompts), self.context_length, dtype=torch.long)
        for row, prompt in zip(ids, prompts, strict=True):
            tokens = [*self.tokenizer.encode(prompt)[: self.context_length - 1], 1]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids

    def encode_tokens(self, ids: Tensor) -> Tensor:
        """Ids (B, L) -> states (B, L, width)."""
        x = self.token_embedding(ids.to(self.token_embedding.weight.device))
        bias = self.position_bias(relative_buckets(ids.shape[1], x.device)).permute(2, 0, 1)[None].contiguous()
        for block in self.blocks:
            x = block(x, bias)
        return self.norm_out(x)

    def forward(self, prompts: Sequence[str]) -> Tensor:
        return self.encode_tokens(self.tokenize(prompts))


def relative_buckets(length: int, device: torch.device) -> Tensor:
    """The bucket of each key j's distance from each query i, (length, length). Half of the buckets are for keys behind
    (j > i); in each half, one for each of the first 8 distances, then ever wider ones up to `FURTHEST`."""
    places = torch.arange(length, device=device)
    distance, half = places[None] - places[:, None], BUCKETS // 2
    exact, far = half // 2, distance.abs().clamp(min=1).float()
    wide = exact + (far / exact).log() / math.log(FURTHEST / exact) * (half - exact)
    near = distance.abs() < exact
    return half * (distance > 0) + torch.where(near, distance.abs(), wide.long().clamp(max=half - 1))


def read_tokenizer(file: Path):
    """The sentencepiece model in a file. Raises InputError where it cannot be read, or the library is missing."""
    try:
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_file=str(file))
    except ImportError:
        raise InputError('T5 needs the library sentencepiece: pip install -e ".[t5]"') from None
    except (OSError, RuntimeError):
        raise InputError(f"{file} cannot be read as a sentencepiece model, such as T5's spiece.model") from None
