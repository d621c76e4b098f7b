"""The multimodal diffusion transformer of Stable Diffusion 3 (Esser et al. 2024, arXiv 2403.03206, figure 2).

The timestep and the pooled text act by modulation: adaptive layer norms (Peebles & Xie 2023, arXiv 2212.09748). Stable
Diffusion 3.5 adds norms of queries and keys, and in its medium size a second attention of the image alone."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from errors import InputError
from models.attention import Attention
from models.unet import ProjectedContext, mlp, timestep_embedding

HEAD = 64  # channels per head


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """layer_norm(x) (1 + scale) + shift, the norm without weights of its own."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class HalfAttention(nn.Module):
    """One sequence's part in an attention: its queries, keys and values, and the projection of what comes out."""

    def __init__(self, dim: int, qk_norm: bool, project_out: bool = True):
        super().__init__()
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.ln_q = nn.RMSNorm(HEAD, eps=1e-6) if qk_norm else nn.Identity()
        self.ln_k = nn.RMSNorm(HEAD, eps=1e-6) if qk_norm else nn.Identity()
        self.to_out = nn.Linear(dim, dim) if project_out else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, dim) -> q, k, v, each (B, heads, N, 64)."""
        q, k, v = rearrange(self.to_qkv(x), "b n (three h d) -> three b h n d", three=3, d=HEAD)
        return self.ln_q(q), self.ln_k(k), v


class Branch(nn.Module):
    """One sequence's part in a joint block. By the modulation (shift, scale, gate of each sum) of the condition c:

        x = x + gate attention(modulate(x)) [+ gate' attention'(modulate'(x)), where `dual`]
        x = x + gate MLP(modulate(x))

    The text's branch of the last block only gives keys and values (`last`): nothing reads the text after it."""

    def __init__(self, dim: int, qk_norm: bool, dual: bool = False, last: bool = False):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, (2 if last else 9 if dual else 6) * dim))
        self.attn = HalfAttention(dim, qk_norm, project_out=not last)
        self.attn2 = HalfAttention(dim, qk_norm) if dual else None
        self.mlp = None if last else mlp(dim, 4 * dim, dim, nn.GELU(approximate="tanh"))


class JointBlock(nn.Module):
    """Text (B, L, dim) and image (B, N, dim) attend to the sequence of both, text first; each has its own weights."""

    def __init__(self, dim: int, qk_norm: bool, dual: bool, last: bool, attention: Attention):
        super().__init__()
        self.context_block = Branch(dim, qk_norm, last=last)
        self.x_block = Branch(dim, qk_norm, dual=dual)
        self.attention = attention

    def forward(self, text: Tensor, image: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        sides = (text, self.context_block), (image, self.x_block)
        # (shift, scale, gate) of the attention, of the MLP and of the second attention
        chunks = [branch.adaLN_modulation(c)[:, None].split(c.shape[-1], dim=-1) for _, branch in sides]
        parts = [branch.attn(modulate(x, *own[:2])) for (x, branch), own in zip(sides, chunks, strict=True)]
        joint = self.attention(*(torch.cat(pair, dim=2) for pair in zip(*parts, strict=True)))
        outs = rearrange(joint, "b h n d -> b n (h d)").split([text.shape[1], image.shape[1]], dim=1)
        results = []
        for (x, branch), own, out in zip(sides, chunks, outs, strict=True):
            if branch.mlp is None:
                results.append(x)
                continue
            y = x + own[2] * branch.attn.to_out(out)
            if branch.attn2 is not None:
                out = self.attention(*branch.attn2(modulate(x, *own[6:8])))
                y = y + own[8] * branch.attn2.to_out(rearrange(out, "b h n d -> b n (h d)"))
            results.append(y + own[5] * branch.mlp(modulate(y, *own[3:5])))
        return results[0], results[1]


class MMDiT(nn.Module):
    """x (B, in_channels, h, w), t (B,) or a scalar in [0, 1000], the text -> the velocity (B, in_channels, h, w).

    h and w must be multiples of `patch`, up to patch * max_positions; InputError beyond. The embeddings of positions
    come with the weights. The switch `gradient_checkpointing` and `attention` are those of the UNet."""

    def __init__(
        self,
        depth: int = 24,  # blocks, heads, and the width in units of 64
        qk_norm: bool = True,  # RMS norms of queries and keys
        dual_attention_layers: Sequence[int] = (),  # blocks in which the image has a second attention
        max_positions: int = 192,  # side of the square of embedded positions, in patches
        in_channels: int = 16,
        patch: int = 2,  # side of the squares of the latent that become tokens
        context_dim: int = 4096,  # width of the text states
        vector_dim: int = 2048,  # width of the pooled text
    ):
        super().__init__()
        dim = HEAD * depth
        self.patch, self.downsampling, self.max_positions = patch, patch, max_positions
        self.gradient_checkpointing = False
        self.attention = Attention()
        self.x_embedder = nn.Conv2d(in_channels, dim, patch, stride=patch)
        self.register_buffer("pos_embed", torch.zeros(1, max_positions**2, dim))
        self.time_embed = mlp(256, dim, dim, nn.SiLU())
        self.vector_embed = mlp(vector_dim, dim, dim, nn.SiLU())
        self.context_embedder = nn.Linear(context_dim, dim)
        self.joint_blocks = nn.ModuleList(
            JointBlock(dim, qk_norm, i in dual_attention_layers, i == depth - 1, self.attention) for i in range(depth)
        )
        modulation, linear = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim)), nn.Linear(dim, patch**2 * in_channels)
        self.final_layer = nn.ModuleDict({"adaLN_modulation": modulation, "linear": linear})

    def project_context(self, states: Tensor, vector: Tensor) -> ProjectedContext:
        """Text states (B, L, context_dim) and pooled text (B, vector_dim) -> what each step needs of them."""
        return ProjectedContext(self.context_embedder(states), self.vector_embed(vector))

    def positions(self, h: int, w: int) -> Tensor:
        """The embeddings of h x w patches, cut from the centre of the square: (1, h w, dim)."""
        side = self.max_positions
        if max(h, w) > side:
            raise InputError(f"the latent has {w}x{h} patches, and this network knows positions of {side}x{side}")
        top, left = (side - h) // 2, (side - w) // 2
        square = rearrange(self.pos_embed, "1 (h w) c -> 1 h w c", h=side)
        return square[:, top : top + h, left : left + w].flatten(1, 2)

    def forward(self, x: Tensor, t: Tensor | float, text: ProjectedContext, pixels: object = None) -> Tensor:
        h, w = x.shape[-2] // self.patch, x.shape[-1] // self.patch
        t = torch.as_tensor(t, device=x.device).expand(x.shape[0])
        c = self.time_embed(timestep_embedding(t, 256).to(x.dtype)) + text.vector
        image = rearrange(self.x_embedder(x), "b c h w -> b (h w) c") + self.positions(h, w)
        context = text.states
        for block in self.joint_blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                context, image = checkpoint(block, context, image, c, use_reentrant=False, preserve_rng_state=False)
            else:
                context, image = block(context, image, c)
        shift, scale = self.final_layer["adaLN_modulation"](c)[:, None].chunk(2, dim=-1)
        patches = self.final_layer["linear"](modulate(image, shift, scale))
        return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=h, p=self.patch, q=self.patch)


# Named sizes (Esser et al., 2024, and the model cards of 3.5): 2.0, 2.2 and 8.1 billion parameters.

SD3_MEDIUM = dict(depth=24, qk_norm=False, max_positions=192)
SD35_MEDIUM = dict(depth=24, dual_attention_layers=list(range(13)), max_positions=384)
SD35_LARGE = dict(depth=38, max_positions=192)
