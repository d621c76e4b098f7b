"""The denoising UNet of latent diffusion (Rombach et al., 2022), of which Stable Diffusion 1.x, 2.x and XL are sizes.

Module names follow the released checkpoints, so `models/names.py` has few rules. The named sizes stand at the end."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from errors import InputError
from models.attention import Attention, CrossAttention, SelfAttention

SIZE_CHANNELS = 256  # sinusoids of each of the picture's sizes


@dataclass
class ProjectedContext:
    """What a network's steps need of a text, which depends on neither x nor t; see `project_context`."""

    states: list[tuple[Tensor, Tensor]] | Tensor  # keys and values of each cross-attention, in the layers' order, each
    # (B, heads, L, d); or an MMDiT's tokens (B, L, dim)
    vector: Tensor | None = None  # (B, D), of a network that takes one


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of the timestep, cosines first: t (B,) -> (B, dim), float32 (Vaswani et al., 2017, section 3.5)."""
    half = dim // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t[:, None].float() * freqs
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


def zero_init(module: nn.Module) -> nn.Module:
    """Set all parameters of a last layer to zero, so that its block starts out as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def mlp(n_in: int, n_hidden: int, n_out: int, activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_in, n_hidden), activation, nn.Linear(n_hidden, n_out))


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + time))), with a 1x1 convolution on the skip where widths differ:
    (B, in, H, W) -> (B, out, H, W). The autoencoder's blocks have no time (`time_dim` None)."""

    def __init__(self, in_channels: int, out_channels: int, time_dim: int | None = None, eps: float = 1e-5):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_dim, out_channels) if time_dim else None
        self.norm2 = nn.GroupNorm(32, out_channels, eps)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """`time` (B, time_dim) is the embedding after its SiLU, which all blocks share."""
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time is not None:
            h = h + self.time(time)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution: (B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    """A strided 3x3 convolution: (B, C, H, W) -> (B, C, H/2, W/2). The UNet pads all four sides by one; the autoencoder
    pads right and bottom only (`asymmetric`)."""

    def __init__(self, channels: int, asymmetric: bool = False):
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class GEGLU(nn.Module):
    """Feed-forward of Shazeer (2020): (x W) * gelu(x V), with the exact GELU, then a projection back."""

    def __init__(self, dim: int, mult: int = 4):
        super().__init__()
        self.proj_in = nn.Linear(dim, 2 * mult * dim)
        self.proj_out = nn.Linear(mult * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention on the text, feed-forward; each on the normalised input, each residual."""

    def __init__(self, dim: int, heads: int, head_dim: int, context_dim: int, attention: Attention):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = SelfAttention(dim, heads, head_dim, attention)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = CrossAttention(dim, context_dim, heads, head_dim, attention)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = GEGLU(dim)

    def forward(self, x: Tensor, kv: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), kv)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, residual: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, heads: int, context_dim: int, depth: int, attention: Attention, slot: int):
        super().__init__()
        self.slot = slot  # place of the first block's keys and values in ProjectedContext.states; the others follow
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads, channels // heads, context_dim, attention) for _ in range(depth)
        )
        self.proj_out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: ProjectedContext) -> Tensor:
        y = self.proj_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        for i, block in enumerate(self.transformer_blocks):
            y = block(y, context.states[self.slot + i])
        return x + rearrange(self.proj_out(y), "b (h w) c -> b c h w", h=x.shape[-2])


class Stage(nn.Sequential):
    """Sequential that passes the time to residual blocks and the text to transformers."""

    def forward(self, x: Tensor, time: Tensor, context: ProjectedContext) -> Tensor:
        for module in self:
            more = [time] if isinstance(module, ResBlock) else [context] * isinstance(module, SpatialTransformer)
            x = module(x, *more)
        return x


class UNet(nn.Module):
    """x (B, in_channels, h, w), t (B,) or a scalar, context (B, L, context_dim) -> (B, out_channels, h, w).

    h and w must be multiples of 2 ** (levels - 1). The output is raw: noise or v, see `LatentDiffusion.prediction`. The
    switch `gradient_checkpointing` trades a second forward pass for the memory of the activations. `attention` is
    shared by all attention layers. Raises InputError where the widths cannot be split into the heads.

    With `vector_dim`, the text's vector and six sizes of the picture are embedded and added to the time's embedding
    (Podell et al., 2023, arXiv 2307.01952, section 2.2): `pixels`, the picture's (height, width), and no crop."""

    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        model_channels: int = 320,  # width of the first level
        channel_mult: Sequence[int] = (1, 2, 4, 4),  # width of each level, times model_channels
        num_res_blocks: int = 2,  # per level on the way down; one more on the way up
        attention_levels: Sequence[int] | None = None,  # levels with transformers; None: all but the last
        num_heads: int | Sequence[int] | None = None,  # heads (Stable Diffusion 1.x: 8), the same or for each level ...
        num_head_channels: int | None = None,  # ... or channels per head (Stable Diffusion 2.x: 64)
        transformer_depth: int | Sequence[int] = 1,  # transformer blocks per spatial transformer, likewise
        context_dim: int = 768,  # width of the text states
        vector_dim: int | None = None,  # width of the text's vector, plus 6 * SIZE_CHANNELS (SDXL); None: takes none
    ):
        super().__init__()
        levels, widths = len(channel_mult), [mult * model_channels for mult in channel_mult]
        attention_levels = range(levels - 1) if attention_levels is None else attention_levels
        self.model_channels = model_channels
        self.downsampling = 2 ** (levels - 1)
        self.gradient_checkpointing = False
        self.attention = Attention()
        self.blocks_up = num_res_blocks + 1  # of each level
        time_dim = 4 * model_channels

        def transformer(c: int, level: int) -> SpatialTransformer:
            heads, depth = (v[level] if isinstance(v, Sequence) else v for v in (num_heads, transformer_depth))
            heads = heads or c // num_head_channels
            if not heads or c % heads:
                raise InputError(f"the UNet's width {c} cannot be split into {heads} heads")
            slot = sum(isinstance(m, CrossAttention) for m in self.modules())
            return SpatialTransformer(c, heads, context_dim, depth, self.attention, slot)

        def blocks(before: int, level: int) -> list[nn.Module]:
            layers = [ResBlock(before, widths[level], time_dim)]
            return [*layers, transformer(widths[level], level)] if level in attention_levels else layers

        self.time_embed = mlp(model_channels, time_dim, time_dim, nn.SiLU())
        self.vector_embed = mlp(vector_dim, time_dim, time_dim, nn.SiLU()) if vector_dim else None

        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(in_channels, model_channels, 3, padding=1))])
        skips = [model_channels]
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                self.input_blocks.append(Stage(*blocks(skips[-1], level)))
                skips.append(width)
            if level < levels - 1:
                self.input_blocks.append(Stage(Downsample(width)))
                skips.append(width)

        self.middle_block = Stage(
            ResBlock(width, width, time_dim), transformer(width, levels - 1), ResBlock(width, width, time_dim)
        )

        self.output_blocks = nn.ModuleList()
        for level in reversed(range(levels)):
            for i in range(num_res_blocks + 1):
                layers = blocks(width + skips.pop(), level)
                width = widths[level]
                if level > 0 and i == num_res_blocks:
                    layers.append(Upsample(width))
                self.output_blocks.append(Stage(*layers))

        self.out = nn.Sequential(
            nn.GroupNorm(32, width, eps=1e-5), nn.SiLU(), zero_init(nn.Conv2d(width, out_channels, 3, padding=1))
        )

    def project_context(self, context: Tensor, vector: Tensor | None = None) -> ProjectedContext:
        """Text states (B, L, context_dim) -> keys and values of every layer, for all steps, with the vector (B, D)."""
        layers = [m for m in self.modules() if isinstance(m, CrossAttention)]
        return ProjectedContext([layer.project(context) for layer in layers], vector)

    @contextmanager
    def features_hooked(self, hook: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
        """Inside, `hook` sees the features that Plug-and-Play injects, (B, C, h, w), and may replace them: what the
        second residual block of the level above the lowest, on the way up, adds to its skip. A compiled network must
        be inside `attention.hooked` too."""
        layer = self.output_blocks[self.blocks_up + 1][0].conv2
        handle = layer.register_forward_hook(lambda _, __, features: hook(features))
        try:
            yield
        finally:
            handle.remove()

    def forward(
        self, x: Tensor, t: Tensor | int, context: Tensor | ProjectedContext, pixels: tuple[int, int] | None = None
    ) -> Tensor:
        t = torch.as_tensor(t, device=x.device).expand(x.shape[0])
        if not isinstance(context, ProjectedContext):
            context = self.project_context(context.expand(x.shape[0], -1, -1))
        time = self.time_embed(timestep_embedding(t, self.model_channels).to(x.dtype))
        if self.vector_embed is not None:
            sizes = [*pixels, 0, 0, *pixels]  # original size, corner of the crop, target size
            sizes = torch.stack([torch.full((), size, device=x.device) for size in sizes])  # no copy to a device
            sizes = timestep_embedding(sizes, SIZE_CHANNELS).flatten().expand(x.shape[0], -1).to(x.dtype)
            time = time + self.vector_embed(torch.cat([context.vector.to(x.dtype), sizes], dim=-1))
        time = F.silu(time)

        def run(stage: Stage, h: Tensor) -> Tensor:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                return checkpoint(stage, h, time, context, use_reentrant=False, preserve_rng_state=False)
            return stage(h, time, context)

        h, skips = x, []
        for stage in self.input_blocks:
            h = run(stage, h)
            skips.append(h)
        h = run(self.middle_block, h)
        for stage in self.output_blocks:
            h = run(stage, torch.cat([h, skips.pop()], dim=1))
        return self.out(h)


# Named sizes: of Stable Diffusion 1.x and of 2.x (Rombach et al., 2022), and of SDXL. Later families go below.

SD1 = dict(model_channels=320, channel_mult=[1, 2, 4, 4], num_res_blocks=2, num_heads=8, context_dim=768)
SD2 = dict(model_channels=320, channel_mult=[1, 2, 4, 4], num_res_blocks=2, num_head_channels=64, context_dim=1024)
SDXL = dict(model_channels=320, channel_mult=[1, 2, 4], num_res_blocks=2, attention_levels=[1, 2], num_head_channels=64,
            transformer_depth=[0, 2, 10], context_dim=2048, vector_dim=1280 + 6 * SIZE_CHANNELS)  # fmt: skip
