"""The KL autoencoder of latent diffusion (Rombach et al., 2022): images to a small latent and back."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.attention import attention
from models.unet import Downsample, ResBlock, Upsample, zero_init
from samplers import noise_like


class AttentionBlock(nn.Module):
    """Single-head self-attention over the pixels, residual: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        y = rearrange(self.norm(x), "b c h w -> b (h w) c")
        q, k, v = rearrange(self.to_qkv(y), "b n (three c) -> three b 1 n c", three=3)
        y = self.to_out(attention(q, k, v).squeeze(1))
        return x + rearrange(y, "b (h w) c -> b c h w", h=x.shape[-2])


def res_blocks(widths: Sequence[int]) -> nn.Sequential:
    return nn.Sequential(*(ResBlock(a, b, eps=1e-6) for a, b in pairwise(widths)))


def middle(width: int) -> nn.Sequential:
    block = lambda: ResBlock(width, width, eps=1e-6)
    return nn.Sequential(OrderedDict(block_1=block(), attn_1=AttentionBlock(width), block_2=block()))


class Encoder(nn.Module):
    def __init__(self, in_channels: int, ch: int, ch_mult: Sequence[int], num_res_blocks: int, z_channels: int):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.Sequential()
        widths = [ch, *(mult * ch for mult in ch_mult)]
        for i, (before, width) in enumerate(pairwise(widths), start=1):
            blocks = res_blocks([before] + [width] * num_res_blocks)
            resample = Downsample(width, asymmetric=True) if i < len(ch_mult) else nn.Identity()
            self.down.append(nn.Sequential(OrderedDict(block=blocks, resample=resample)))
        self.mid = middle(width)
        self.norm_out = nn.GroupNorm(32, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, 2 * z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mid(self.down(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    def __init__(self, out_channels: int, ch: int, ch_mult: Sequence[int], num_res_blocks: int, z_channels: int):
        super().__init__()
        widths = [mult * ch for mult in (*ch_mult, ch_mult[-1])]  # of the levels from the finest, and of the middle
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1])
        self.up = nn.Sequential()
        for i, (width, before) in reversed([*enumerate(pairwise(widths))]):
            blocks = res_blocks([before] + [width] * (num_res_blocks + 1))
            resample = Upsample(width) if i > 0 else nn.Identity()
            self.up.insert(0, nn.Sequential(OrderedDict(block=blocks, resample=resample)))  # numbered from the finest
        self.norm_out = nn.GroupNorm(32, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for each in reversed(self.up):
            h = each(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Autoencoder(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] to latents (B, z_channels, H/f, W/f), f = patch * 2 ** (levels - 1), and back.

    `patch` folds patch x patch pixels into channels before the first convolution, which saves the costly work at
    full resolution; Stable Diffusion has 1. Latents are (mean - `shift_factor`) `scale_factor`, of about unit variance.
    """

    def __init__(
        self,
        ch: int = 128,  # width of the first level
        ch_mult: Sequence[int] = (1, 2, 4, 4),  # width of each level, times ch
        num_res_blocks: int = 2,  # per level of the encoder; one more in the decoder
        z_channels: int = 4,
        scale_factor: float = 0.18215,
        patch: int = 1,
        shift_factor: float = 0.0,
        quant_conv: bool = True,  # 1x1 convolutions around the latent, which Stable Diffusion 3 leaves out
    ):
        super().__init__()
        self.patch, self.z_channels = patch, z_channels
        self.scale_factor, self.shift_factor = float(scale_factor), float(shift_factor)
        self.downsampling = patch * 2 ** (len(ch_mult) - 1)
        pixels = 3 * patch**2
        self.encoder = Encoder(pixels, ch, ch_mult, num_res_blocks, z_channels)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1) if quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1) if quant_conv else nn.Identity()
        self.decoder = Decoder(pixels, ch, ch_mult, num_res_blocks, z_channels)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z|x), unscaled, each (B, z_channels, h, w); log-variance within [-30, 20]."""
        x = rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=self.patch, q=self.patch)
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latents: the posterior's mean, or a sample of it where a generator is given."""
        mean, logvar = self.posterior(x)
        if generator is not None:
            mean = mean + (0.5 * logvar).exp() * noise_like(mean, generator)
        return (mean - self.shift_factor) * self.scale_factor

    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents (B, z_channels, h, w) -> images (B, 3, H, W), about [-1, 1], not clamped."""
        x = self.decoder(self.post_quant_conv(z / self.scale_factor + self.shift_factor))
        return rearrange(x, "b (c p q) h w -> b c (h p) (w q)", p=self.patch, q=self.patch)


# The autoencoder of Stable Diffusion 1.x and 2.x; those of SDXL and of SD3. Later families go below.

KL_F8 = dict(ch=128, ch_mult=[1, 2, 4, 4], num_res_blocks=2, z_channels=4, scale_factor=0.18215)
KL_F8_XL = KL_F8 | dict(scale_factor=0.13025)
KL_F8_16 = KL_F8 | dict(z_channels=16, scale_factor=1.5305, shift_factor=0.0609, quant_conv=False)
