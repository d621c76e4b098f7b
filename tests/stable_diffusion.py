"""An oracle for Stable Diffusion 1.x and 2.x at any size, and a maker of random checkpoints as others publish them.

Written apart from `models/`, from the papers and the published key names, so that agreement means something. Weights
are one flat dict under the names of the folder layout ("unet.conv_in.weight", "vae.quant_conv.bias",
"text_encoder.final_layer_norm.weight"); the networks are plain functional calls that look weights up by name. `sizes`
has the form of fixtures/*/arch.json; `style` is 1 or 2. The fixtures' recorded outputs check the networks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]

_VAE = dict(ch=128, ch_mult=[1, 2, 4, 4], num_res_blocks=2, z_channels=4, scale_factor=0.18215)
_UNET = dict(model_channels=320, channel_mult=[1, 2, 4, 4], num_res_blocks=2)
_CLIP = dict(vocab_size=49408, context_length=77)
_SCHEDULE = dict(kind="scaled_linear", beta_start=0.00085, beta_end=0.012, timesteps=1000)
PUBLISHED = {  # the sizes of the real models, by style
    1: dict(
        unet=dict(**_UNET, num_heads=8, context_dim=768),
        vae=_VAE,
        text=dict(**_CLIP, width=768, layers=12, heads=12, quick_gelu=True),
        schedule=_SCHEDULE,
    ),
    2: dict(
        unet=dict(**_UNET, num_head_channels=64, use_linear_projection=True, context_dim=1024),
        vae=_VAE,
        text=dict(**_CLIP, width=1024, layers=24, heads=16, quick_gelu=False, hidden_layer="penultimate"),
        schedule=_SCHEDULE,
    ),
}


# ---- the networks --------------------------------------------------------------------------------------------------


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    """A matrix, or a 1x1 convolution's weight used as one, on the last axis."""
    return F.linear(x, w[f"{name}.weight"].flatten(1), w.get(f"{name}.bias"))


def conv(w: Weights, name: str, x: Tensor, **stride_and_padding) -> Tensor:
    weight = w[f"{name}.weight"]
    return F.conv2d(x, weight, w[f"{name}.bias"], **{"padding": weight.shape[-1] // 2, **stride_and_padding})


def group_norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    return F.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"], eps)


def layer_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """(B, N, h*d) each -> (B, N, h*d): softmax(q k^T / sqrt(d)) v."""
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if causal:
        scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
    return rearrange(scores.softmax(-1) @ v, "b h n d -> b n (h d)")


def each(w: Weights, prefix: str) -> Iterator[str]:
    """prefix.0, prefix.1, ... for as long as there are weights under it."""
    numbers = {int(k[len(prefix) + 1 :].split(".")[0]) for k in w if k.startswith(f"{prefix}.")}
    assert numbers == set(range(len(numbers))), prefix
    return (f"{prefix}.{i}" for i in sorted(numbers))


def residual_block(w: Weights, p: str, x: Tensor, eps: float, time: Tensor | None = None) -> Tensor:
    h = conv(w, f"{p}.conv1", F.silu(group_norm(w, f"{p}.norm1", x, eps)))
    if time is not None:
        h = h + linear(w, f"{p}.time_emb_proj", F.silu(time))[:, :, None, None]
    h = conv(w, f"{p}.conv2", F.silu(group_norm(w, f"{p}.norm2", h, eps)))
    return h + (conv(w, f"{p}.conv_shortcut", x) if f"{p}.conv_shortcut.weight" in w else x)


def text_encoder(w: Weights, sizes: Mapping, ids: Tensor) -> Tensor:
    """(B, L) token ids -> (B, L, C). 1.x: last layer, quick-GELU; 2.x: last but one, GELU; then the final norm."""
    text, root = sizes["text"], "text_encoder"
    x = w[f"{root}.embeddings.token_embedding.weight"][ids]
    x = x + w[f"{root}.embeddings.position_embedding.weight"][: ids.shape[1]]
    used = text["layers"] - (text.get("hidden_layer") == "penultimate")
    for p in list(each(w, f"{root}.encoder.layers"))[:used]:
        h = layer_norm(w, f"{p}.layer_norm1", x)
        q, k, v = (linear(w, f"{p}.self_attn.{n}_proj", h) for n in "qkv")
        x = x + linear(w, f"{p}.self_attn.out_proj", attention(q, k, v, text["heads"], causal=True))
        h = linear(w, f"{p}.mlp.fc1", layer_norm(w, f"{p}.layer_norm2", x))
        h = h * torch.sigmoid(1.702 * h) if text["quick_gelu"] else F.gelu(h)
        x = x + linear(w, f"{p}.mlp.fc2", h)
    return layer_norm(w, f"{root}.final_layer_norm", x)


def _vae_middle(w: Weights, p: str, x: Tensor) -> Tensor:
    x = residual_block(w, f"{p}.resnets.0", x, 1e-6)
    a = f"{p}.attentions.0"
    h = rearrange(group_norm(w, f"{a}.group_norm", x, 1e-6), "b c h w -> b (h w) c")
    h = attention(*(linear(w, f"{a}.to_{n}", h) for n in "qkv"), heads=1)
    x = x + rearrange(linear(w, f"{a}.to_out.0", h), "b (h w) c -> b c h w", h=x.shape[2])
    return residual_block(w, f"{p}.resnets.1", x, 1e-6)


def vae_encode(w: Weights, image: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 3, H, W) -> the posterior's mean and log-variance, unscaled (B, z, h, w) each."""
    root = "vae.encoder"
    x = conv(w, f"{root}.conv_in", image)
    for level in each(w, f"{root}.down_blocks"):
        for p in each(w, f"{level}.resnets"):
            x = residual_block(w, p, x, 1e-6)
        for p in each(w, f"{level}.downsamplers"):
            x = conv(w, f"{p}.conv", F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
    x = _vae_middle(w, f"{root}.mid_block", x)
    x = conv(w, f"{root}.conv_out", F.silu(group_norm(w, f"{root}.conv_norm_out", x, 1e-6)))
    mean, logvar = conv(w, "vae.quant_conv", x).chunk(2, dim=1)
    return mean, logvar.clamp(-30, 20)


def vae_decode(w: Weights, z: Tensor) -> Tensor:
    """Unscaled latents (B, z, h, w) -> (B, 3, H, W)."""
    root = "vae.decoder"
    x = _vae_middle(w, f"{root}.mid_block", conv(w, f"{root}.conv_in", conv(w, "vae.post_quant_conv", z)))
    for level in each(w, f"{root}.up_blocks"):
        for p in each(w, f"{level}.resnets"):
            x = residual_block(w, p, x, 1e-6)
        for p in each(w, f"{level}.upsamplers"):
            x = conv(w, f"{p}.conv", F.interpolate(x, scale_factor=2.0, mode="nearest"))
    return conv(w, f"{root}.conv_out", F.silu(group_norm(w, f"{root}.conv_norm_out", x, 1e-6)))


def _transformer(w: Weights, p: str, x: Tensor, context: Tensor, heads: int) -> Tensor:
    h = rearrange(group_norm(w, f"{p}.norm", x, 1e-6), "b c h w -> b (h w) c")
    h = linear(w, f"{p}.proj_in", h)
    for b in each(w, f"{p}.transformer_blocks"):
        for norm, attn, other in (("norm1", "attn1", None), ("norm2", "attn2", context)):
            n = layer_norm(w, f"{b}.{norm}", h)
            source = n if other is None else other
            q, k, v = (linear(w, f"{b}.{attn}.to_{name}", y) for name, y in (("q", n), ("k", source), ("v", source)))
            h = h + linear(w, f"{b}.{attn}.to_out.0", attention(q, k, v, heads))
        value, gate = linear(w, f"{b}.ff.net.0.proj", layer_norm(w, f"{b}.norm3", h)).chunk(2, dim=-1)
        h = h + linear(w, f"{b}.ff.net.2", value * F.gelu(gate))
    return x + rearrange(linear(w, f"{p}.proj_out", h), "b (h w) c -> b c h w", h=x.shape[2])


def unet(w: Weights, sizes: Mapping, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
    """Noisy latents (B, c, h, w), timesteps (B,), text states (B, L, C) -> the raw output (B, c, h, w)."""
    w = {k[5:]: v for k, v in w.items() if k.startswith("unet.")}
    half = sizes["unet"]["model_channels"] // 2
    angles = t[:, None].float() * 10000.0 ** (-torch.arange(half) / half)
    time = linear(w, "time_embedding.linear_1", torch.cat([angles.cos(), angles.sin()], dim=-1))
    time = linear(w, "time_embedding.linear_2", F.silu(time))

    def block(level: str, j: int, x: Tensor) -> Tensor:
        x = residual_block(w, f"{level}.resnets.{j}", x, 1e-5, time)
        if f"{level}.attentions.{j}.norm.weight" not in w:
            return x
        heads = sizes["unet"].get("num_heads") or x.shape[1] // sizes["unet"]["num_head_channels"]
        return _transformer(w, f"{level}.attentions.{j}", x, context, heads)

    x = conv(w, "conv_in", x)
    skips = [x]
    for level in each(w, "down_blocks"):
        for j, _ in enumerate(each(w, f"{level}.resnets")):
            x = block(level, j, x)
            skips.append(x)
        for p in each(w, f"{level}.downsamplers"):
            x = conv(w, f"{p}.conv", x, stride=2)
            skips.append(x)
    x = residual_block(w, "mid_block.resnets.1", block("mid_block", 0, x), 1e-5, time)
    for level in each(w, "up_blocks"):
        for j, _ in enumerate(each(w, f"{level}.resnets")):
            x = block(level, j, torch.cat([x, skips.pop()], dim=1))
        for p in each(w, f"{level}.upsamplers"):
            x = conv(w, f"{p}.conv", F.interpolate(x, scale_factor=2.0, mode="nearest"))
    assert not skips
    return conv(w, "conv_out", F.silu(group_norm(w, "conv_norm_out", x, 1e-5)))


# ---- names and shapes ----------------------------------------------------------------------------------------------


def shapes(sizes: Mapping) -> dict[str, tuple[int, ...]]:
    """Every weight of a model of these sizes, under the folder layout's names."""
    found: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *shape: int, bias: bool = True) -> None:
        found[f"{name}.weight"] = shape
        if bias:
            found[f"{name}.bias"] = shape[:1]

    def resnet(p: str, a: int, b: int, time: int = 0) -> None:
        layer(f"{p}.norm1", a), layer(f"{p}.conv1", b, a, 3, 3), layer(f"{p}.norm2", b), layer(f"{p}.conv2", b, b, 3, 3)
        if time:
            layer(f"{p}.time_emb_proj", b, time)
        if a != b:
            layer(f"{p}.conv_shortcut", b, a, 1, 1)

    u, v, text = sizes["unet"], sizes["vae"], sizes["text"]
    n, levels = u["num_res_blocks"], len(u["channel_mult"])
    widths, time = [u["model_channels"] * m for m in u["channel_mult"]], 4 * u["model_channels"]
    kernel = () if u.get("use_linear_projection") else (1, 1)

    def transformer(p: str, c: int) -> None:
        layer(f"{p}.norm", c), layer(f"{p}.proj_in", c, c, *kernel), layer(f"{p}.proj_out", c, c, *kernel)
        for d in range(u.get("transformer_depth", 1)):
            b = f"{p}.transformer_blocks.{d}"
            for attn, source in (("attn1", c), ("attn2", u["context_dim"])):
                layer(f"{b}.{attn}.to_q", c, c, bias=False)
                layer(f"{b}.{attn}.to_k", c, source, bias=False)
                layer(f"{b}.{attn}.to_v", c, source, bias=False)
                layer(f"{b}.{attn}.to_out.0", c, c)
            layer(f"{b}.ff.net.0.proj", 8 * c, c), layer(f"{b}.ff.net.2", c, 4 * c)
            layer(f"{b}.norm1", c), layer(f"{b}.norm2", c), layer(f"{b}.norm3", c)

    layer("unet.time_embedding.linear_1", time, widths[0]), layer("unet.time_embedding.linear_2", time, time)
    layer("unet.conv_in", widths[0], 4, 3, 3)
    x, skips = widths[0], [widths[0]]
    for i, c in enumerate(widths):
        p, last = f"unet.down_blocks.{i}", i == levels - 1
        for j in range(n):
            resnet(f"{p}.resnets.{j}", x, c, time)
            if not last:
                transformer(f"{p}.attentions.{j}", c)
            x = c
            skips.append(c)
        if not last:
            layer(f"{p}.downsamplers.0.conv", c, c, 3, 3)
            skips.append(c)
    resnet("unet.mid_block.resnets.0", x, x, time), transformer("unet.mid_block.attentions.0", x)
    resnet("unet.mid_block.resnets.1", x, x, time)
    for i, c in enumerate(reversed(widths)):
        p = f"unet.up_blocks.{i}"
        for j in range(n + 1):
            resnet(f"{p}.resnets.{j}", x + skips.pop(), c, time)
            if i:
                transformer(f"{p}.attentions.{j}", c)
            x = c
        if i < levels - 1:
            layer(f"{p}.upsamplers.0.conv", c, c, 3, 3)
    layer("unet.conv_norm_out", x), layer("unet.conv_out", 4, x, 3, 3)

    widths, z = [v["ch"] * m for m in v["ch_mult"]], v["z_channels"]
    for half, order, blocks, ends in (
        ("encoder", widths, v["num_res_blocks"], (3, 2 * z)),
        ("decoder", widths[::-1], v["num_res_blocks"] + 1, (z, 3)),
    ):
        p, x, top = f"vae.{half}", order[0], widths[-1]
        level, scaler = ("down_blocks", "downsamplers") if half == "encoder" else ("up_blocks", "upsamplers")
        layer(f"{p}.conv_in", order[0], ends[0], 3, 3)
        for i, c in enumerate(order):
            for j in range(blocks):
                resnet(f"{p}.{level}.{i}.resnets.{j}", x, c)
                x = c
            if i < len(order) - 1:
                layer(f"{p}.{level}.{i}.{scaler}.0.conv", c, c, 3, 3)
        m = f"{p}.mid_block"
        resnet(f"{m}.resnets.0", top, top), resnet(f"{m}.resnets.1", top, top)
        layer(f"{m}.attentions.0.group_norm", top)
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            layer(f"{m}.attentions.0.{name}", top, top)
        layer(f"{p}.conv_norm_out", x), layer(f"{p}.conv_out", ends[1], x, 3, 3)
    layer("vae.quant_conv", 2 * z, 2 * z, 1, 1), layer("vae.post_quant_conv", z, z, 1, 1)

    c, p = text["width"], "text_encoder"
    layer(f"{p}.embeddings.token_embedding", text["vocab_size"], c, bias=False)
    layer(f"{p}.embeddings.position_embedding", text["context_length"], c, bias=False)
    for i in range(text["layers"]):
        b = f"{p}.encoder.layers.{i}"
        layer(f"{b}.layer_norm1", c), layer(f"{b}.layer_norm2", c)
        layer(f"{b}.mlp.fc1", 4 * c, c), layer(f"{b}.mlp.fc2", c, 4 * c)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layer(f"{b}.self_attn.{name}", c, c)
    layer(f"{p}.final_layer_norm", c)
    return found


_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm": "ln_",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def single_file_name(name: str, sizes: Mapping, style: int) -> tuple[str, int | None]:
    """A folder-layout name -> its name in a single file, and which third of that tensor it is, if not the whole."""
    part, rest = name.split(".", 1)
    numbers = [int(i) for i in re.findall(r"\.(\d+)\.", f".{rest}")]
    leaf = rest.rsplit(".", 1)[1]
    if part == "text_encoder":
        if style == 1:
            return f"cond_stage_model.transformer.text_model.{rest}", None
        if fused := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", rest):
            i, which, leaf = fused.groups()
            name = f"cond_stage_model.model.transformer.resblocks.{i}.attn.in_proj_{leaf}"
            return name, "qkv".index(which)
        for ours, theirs in _OPEN_CLIP.items():
            rest = rest.replace(ours, theirs)
        return f"cond_stage_model.model.{rest}", None
    if part == "unet":
        if (module := rest.rsplit(".", 1)[0]) in _UNET_ENDS:
            return f"model.diffusion_model.{_UNET_ENDS[module]}.{leaf}", None
        side, n = rest.split("_")[0], sizes["unet"]["num_res_blocks"]
        kind, inner = re.search(r"\b(resnets|attentions|downsamplers|upsamplers)\.\d+\.(.*)\.", rest).groups()
        if kind == "resnets":
            inner = _UNET_RESNET[inner]
        elif kind == "downsamplers":
            inner = "op"
        if side == "mid":
            place = f"middle_block.{1 if kind == 'attentions' else 2 * numbers[0]}"
        elif side == "down":  # 0 is conv_in; then n blocks and a downsampler for every level
            index = n if kind == "downsamplers" else numbers[1]
            place = f"input_blocks.{1 + numbers[0] * (n + 1) + index}.{int(kind == 'attentions')}"
        else:  # n + 1 blocks for every level; the upsampler rides on the last one, behind its attention if it has one
            index = n if kind == "upsamplers" else numbers[1]
            behind = {"resnets": 0, "attentions": 1, "upsamplers": 2 if numbers[0] else 1}[kind]
            place = f"output_blocks.{numbers[0] * (n + 1) + index}.{behind}"
        return f"model.diffusion_model.{place}.{inner}.{leaf}", None
    rest = rest.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    rest = rest.replace("samplers.0", "sample").replace("down_blocks", "down").replace("mid_block", "mid")
    rest = rest.replace("mid.resnets.0", "mid.block_1").replace("mid.resnets.1", "mid.block_2")
    rest = rest.replace("resnets", "block").replace("mid.attentions.0", "mid.attn_1")
    if "attn_1" in rest:
        middle, inner = rest.removesuffix(f".{leaf}").split("attn_1.")
        rest = f"{middle}attn_1.{_VAE_ATTENTION[inner]}.{leaf}"
    # the single file counts the decoder's levels from the image, not from the latent
    rest = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{len(sizes['vae']['ch_mult']) - 1 - int(m[1])}", rest)
    return f"first_stage_model.{rest}", None


def to_single_file(w: Weights, sizes: Mapping, style: int) -> Weights:
    """The same weights under the names and in the shapes of a single file."""
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in w.items():
        target, third = single_file_name(name, sizes, style)
        if ".attn_1." in target and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]  # the original autoencoder has 1x1 convolutions here
        parts.setdefault(target, {})[third or 0] = tensor
    return {k: torch.cat([found[i] for i in sorted(found)]) for k, found in parts.items()}


def from_single_file(single: Weights, sizes: Mapping, style: int) -> Weights:
    """The inverse of `to_single_file`; what the networks above do not use is left out."""
    w: Weights = {}
    for name, shape in shapes(sizes).items():
        source, third = single_file_name(name, sizes, style)
        w[name] = (single[source] if third is None else single[source].chunk(3)[third]).reshape(shape)
    return w


# ---- random checkpoints, and writing them as others do ---------------------------------------------------------------


# What feeds a norm after having come out of one: kept small, so that the epsilon of that norm shows in the outputs.
_QUIET = re.compile(
    r"(conv_in|conv1|conv2|time_emb_proj|proj_in|to_out\.0|net\.2|out_proj|fc2)\.|n_embedding\."
    r"|(conv_shortcut|samplers\.0\.conv)\.bias"
)


def make_checkpoint(sizes: Mapping, seed: int = 0, dtype: torch.dtype = torch.float32) -> Weights:
    """Random float32 weights, rounded through `dtype`, scaled so that no path through a network fades out."""
    generator, w = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes(sizes).items():
        x = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            x = 0.2 * x + (1.0 if name.endswith("weight") else 0.0)
        elif "_embedding.weight" not in name:
            x = x * (2 if re.search(r"[._][qk](_proj)?\.weight", name) else 1) / x[0].numel() ** 0.5  # sharp attention
        w[name] = (0.01 * x if _QUIET.search(name) else x).to(dtype).float()
    return w


def schedule_buffers() -> Weights:
    """What a training run's file carries of Stable Diffusion's noise schedule."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bars = (1 - betas).cumprod(0)
    buffers = {
        "betas": betas,
        "alphas_cumprod": alpha_bars,
        "alphas_cumprod_prev": torch.cat([alpha_bars.new_ones(1), alpha_bars[:-1]]),
        "sqrt_alphas_cumprod": alpha_bars.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alpha_bars).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - alpha_bars).log(),
        "sqrt_recip_alphas_cumprod": alpha_bars.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alpha_bars - 1).sqrt(),
    }
    return {k: v.float() for k, v in buffers.items()}


def write_single_file(
    path: Path,
    w: Weights,
    sizes: Mapping,
    style: int,
    dtype: torch.dtype = torch.float32,
    ema: Weights | None = None,
    position_ids: bool = True,
    buffers: bool = True,
) -> Path:
    """A single file as published: .safetensors, or .ckpt with everything under "state_dict". `ema` gives the averaged
    weights (of the UNet; the rest has none) of a file from a training run."""
    state = {k: v.to(dtype) for k, v in to_single_file(w, sizes, style).items()}
    if style == 2:  # parts of the CLIP model that conditioning does not use
        width = sizes["text"]["width"]
        state["cond_stage_model.model.text_projection"] = torch.zeros(width, width, dtype=dtype)
        state["cond_stage_model.model.logit_scale"] = torch.tensor(4.6, dtype=dtype)
        state["cond_stage_model.model.attn_mask"] = torch.full((77, 77), -torch.inf).triu(1)
    elif position_ids:
        state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    if ema is not None:
        averaged = {k: v.to(dtype) for k, v in to_single_file(ema, sizes, style).items() if k.startswith("model.")}
        state |= {"model_ema." + k.removeprefix("model.").replace(".", ""): v for k, v in averaged.items()}
        state["model_ema.decay"] = torch.tensor(0.9999)
        state["model_ema.num_updates"] = torch.tensor(1000, dtype=torch.int32)
    if buffers:
        state |= schedule_buffers()
    if path.suffix == ".ckpt":
        torch.save({"epoch": 0, "global_step": 1000, "state_dict": state}, path)
    else:
        save_file(state, path, {"format": "pt"})
    return path


def hub_configs(sizes: Mapping, style: int, image_size: int) -> dict[str, dict]:
    """The json files of the folder layout that say something about the model, by their path."""
    u, v, text = sizes["unet"], sizes["vae"], sizes["text"]
    widths, vae_levels = [u["model_channels"] * m for m in u["channel_mult"]], len(v["ch_mult"])
    down = ["CrossAttnDownBlock2D"] * (len(widths) - 1) + ["DownBlock2D"]
    told = {}  # settings that the folders of 1.x are older than
    if style == 2:
        told["prediction_type"] = {"epsilon": "epsilon", "v": "v_prediction"}[sizes["prediction"]]
    return {
        "model_index.json": dict(
            _class_name="StableDiffusionPipeline",
            scheduler=["diffusers", "PNDMScheduler"],
            text_encoder=["transformers", "CLIPTextModel"],
            tokenizer=["transformers", "CLIPTokenizer"],
            unet=["diffusers", "UNet2DConditionModel"],
            vae=["diffusers", "AutoencoderKL"],
        ),
        "unet/config.json": dict(
            _class_name="UNet2DConditionModel",
            # a misnomer that is there to stay: the number of heads, for all levels or for each
            attention_head_dim=u.get("num_heads") or [c // u["num_head_channels"] for c in widths],
            block_out_channels=widths,
            cross_attention_dim=u["context_dim"],
            down_block_types=down,
            in_channels=4,
            layers_per_block=u["num_res_blocks"],
            norm_eps=1e-5,
            out_channels=4,
            sample_size=image_size // 2 ** (vae_levels - 1),
            transformer_layers_per_block=u.get("transformer_depth", 1),
            up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
            **({"use_linear_projection": True} if u.get("use_linear_projection") else {}),
        ),
        "vae/config.json": dict(
            _class_name="AutoencoderKL",
            block_out_channels=[v["ch"] * m for m in v["ch_mult"]],
            down_block_types=["DownEncoderBlock2D"] * vae_levels,
            latent_channels=v["z_channels"],
            layers_per_block=v["num_res_blocks"],
            sample_size=image_size,
            up_block_types=["UpDecoderBlock2D"] * vae_levels,
        ),
        "text_encoder/config.json": dict(
            architectures=["CLIPTextModel"],
            hidden_act="quick_gelu" if text["quick_gelu"] else "gelu",
            hidden_size=text["width"],
            intermediate_size=4 * text["width"],
            max_position_embeddings=text["context_length"],
            num_attention_heads=text["heads"],
            num_hidden_layers=text["layers"] - (style == 2),  # 2.x comes without the layer that it skips
            vocab_size=text["vocab_size"],
        ),
        "scheduler/scheduler_config.json": dict(
            _class_name="PNDMScheduler",
            beta_end=0.012,
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            num_train_timesteps=1000,
            set_alpha_to_one=False,
            steps_offset=1,
            **told,
        ),
        "tokenizer/special_tokens_map.json": dict(pad_token="<|endoftext|>" if style == 1 else "!"),
    }


def write_folder(
    folder: Path,
    w: Weights,
    sizes: Mapping,
    style: int,
    dtype: torch.dtype = torch.float32,
    image_size: int = 512,
    variant: str = "",
    shards: int = 1,
    old_names: bool = True,
    position_ids: bool = True,
) -> Path:
    """The hub's folder layout. `old_names` writes the autoencoder's attention and the text encoder's prefix as
    the folders published in 2022 have them. With several shards, each part gets an index."""
    for name, config in hub_configs(sizes, style, image_size).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(config, indent=2))
    unused = f"text_encoder.encoder.layers.{sizes['text']['layers'] - 1}." if style == 2 else "no layer"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"} if old_names else {}
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        state = {k.split(".", 1)[1]: v.to(dtype) for k, v in w.items() if k.startswith(f"{part}.") and unused not in k}
        if part == "vae":
            for new, name in old.items():
                state = {k.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): v for k, v in state.items()}
        if part == "text_encoder":
            if position_ids:
                state["embeddings.position_ids"] = torch.arange(77)[None]
            state = {f"text_model.{k}" if old_names else k: v for k, v in state.items()}
        stem, ending = folder / part / stem, f".{variant}" if variant else ""
        if shards == 1:
            save_file(state, f"{stem}{ending}.safetensors", {"format": "pt"})
            continue
        weight_map = {
            k: f"{stem.name}{ending}-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, k in enumerate(state)
        }
        for file in set(weight_map.values()):
            save_file({k: v for k, v in state.items() if weight_map[k] == file}, folder / part / file, {"format": "pt"})
        index = {"metadata": {"total_size": sum(v.nbytes for v in state.values())}, "weight_map": weight_map}
        Path(f"{stem}.safetensors.index{ending}.json").write_text(json.dumps(index))
    return folder
