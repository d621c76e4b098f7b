"""Published checkpoints in this project's names: one table of rules for each network and layout.

Two layouts are in use: the original release's single file, and the model hub's folder, with a sub-folder for each
network. No key means one thing in one and another in the other, so a table has the rules of both. A rule is a regular
expression and its replacement; a key, less its prefix, passes through all rules of its table, in order. A name of ours
begins with the part that stores it. A new family has named sizes, prefixes and rules, and an entry in `FAMILIES`."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from errors import InputError
from models.autoencoder import KL_F8, KL_F8_16, KL_F8_XL
from models.mmdit import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM
from models.text import CLIP_L, OPEN_CLIP_H, SDXL_BIG_G, SDXL_CLIP_L
from models.unet import SD1, SD2, SDXL

NETWORK = [  # MMDiT and UNet
    (r"^x_embedder\.proj\.|^pos_embed\.proj\.", "x_embedder."),
    (r"^pos_embed\.pos_embed", "pos_embed"),
    (r"^t_embedder\.mlp\.|^time_text_embed\.timestep_embedder\.|^time_embedding\.", "time_embed."),
    (r"^y_embedder\.mlp\.|^time_text_embed\.text_embedder\.|^label_emb\.0\.|^add_embedding\.", "vector_embed."),
    (r"_embed\.linear_1\.", "_embed.0."),
    (r"_embed\.linear_2\.", "_embed.2."),
    (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
    (r"^proj_out\.", "final_layer.linear."),
    (r"^transformer_blocks\.(\d+)\.(norm1|ff)_context\.", r"joint_blocks.\1.context_block.\2."),
    (r"^transformer_blocks\.(\d+)\.attn\.add_(q|k|v)_proj\.", r"joint_blocks.\1.context_block.attn.to_\2."),
    (r"^transformer_blocks\.(\d+)\.attn\.norm_added_(q|k)\.", r"joint_blocks.\1.context_block.attn.ln_\2."),
    (r"^transformer_blocks\.(\d+)\.attn\.to_add_out\.", r"joint_blocks.\1.context_block.attn.to_out."),
    (r"^transformer_blocks\.(\d+)\.", r"joint_blocks.\1.x_block."),
    (r"\.norm1\.linear\.", ".adaLN_modulation.1."),
    (r"\.(attn2?)\.qkv\.", r".\1.to_qkv."),
    (r"\.(attn2?)\.proj\.", r".\1.to_out."),
    (r"\.norm_(q|k)\.", r".ln_\1."),
    (r"_block\.(mlp\.fc1|ff\.net\.0\.proj)\.", "_block.mlp.0."),
    (r"_block\.(mlp\.fc2|ff\.net\.2)\.", "_block.mlp.2."),
    (r"^conv_in\.", "input_blocks.0.0."),
    (r"^conv_norm_out\.", "out.0."),
    (r"^conv_out\.", "out.2."),
    (r"\.in_layers\.0\.", ".norm1."),
    (r"\.in_layers\.2\.", ".conv1."),
    (r"\.emb_layers\.1\.|\.time_emb_proj\.", ".time."),
    (r"\.out_layers\.0\.", ".norm2."),
    (r"\.out_layers\.3\.", ".conv2."),
    (r"\.skip_connection\.|\.conv_shortcut\.", ".skip."),
    (r"\.0\.op\.", ".0.conv."),
    (r"\.to_out\.0\.", ".to_out."),
    (r"\.ff\.net\.0\.proj\.", ".ff.proj_in."),
    (r"\.ff\.net\.2\.", ".ff.proj_out."),
]
AUTOENCODER = [
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.attn_1\.group_norm\.", ".attn_1.norm."),
    (r"\.attn_1\.(to_out\.0|proj_attn|proj_out)\.", ".attn_1.to_out."),
    (r"\.attn_1\.(q(?=uery)|k(?=ey)|v(?=alue)|[qkv](?=\.))\w*\.", r".attn_1.to_\1."),  # query, key, value until 2023
    (r"\.down_blocks\.(\d+)\.", r".down.\1."),
    (r"\.resnets\.", ".block."),
    (r"\.(down|up)sample(\.|rs\.0\.)conv\.", ".resample.conv."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.(nin|conv)_shortcut\.", ".skip."),
]
TEXT = [  # open_clip's names are ours
    (r"^text_model\.", ""),
    (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^embeddings\.token_embedding\.", "token_embedding."),
    (r"^final_layer_norm\.", "ln_final."),
    (r"^encoder\.layers\.(\d+)\.", r"transformer.resblocks.\1."),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.self_attn\.(q|k|v)_proj\.", r".attn.to_\1."),
]
T5 = [
    (r"^encoder\.", ""),
    (r"^shared\.", "token_embedding."),
    (r"^final_layer_norm\.", "norm_out."),
    (r"^block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.", "position_bias."),
    (r"^block\.(\d+)\.layer\.0\.layer_norm\.", r"blocks.\1.norm1."),
    (r"^block\.(\d+)\.layer\.1\.layer_norm\.", r"blocks.\1.norm2."),
    (r"^block\.(\d+)\.layer\.\d\.", r"blocks.\1."),
    (r"\.SelfAttention\.(q|k|v)\.", r".to_\1."),
    (r"\.SelfAttention\.o\.", ".to_out."),
    (r"\.DenseReluDense\.", "."),
]

FIRST, SECOND, THIRD = ("clip.text.tower.", TEXT), ("clip.text_2.tower.", TEXT), ("clip.t5.", T5)
PREFIXES = {  # of a key in a single file, or the hub's sub-folder -> ours, and the rules for the rest
    "model.diffusion_model.": ("unet.", NETWORK),
    "first_stage_model.": ("autoencoder.", AUTOENCODER),
    "cond_stage_model.transformer.": FIRST,  # 1.x
    "cond_stage_model.model.": FIRST,  # 2.x
    "conditioner.embedders.0.transformer.": FIRST,  # SDXL
    "conditioner.embedders.1.model.": SECOND,
    "conditioner.embedders.1.transformer.": SECOND,  # by some trainers
    "text_encoders.clip_l.transformer.": FIRST,  # SD3
    "text_encoders.clip_g.transformer.": SECOND,
    "text_encoders.t5xxl.transformer.": THIRD,
    "unet/": ("unet.", NETWORK),
    "transformer/": ("unet.", NETWORK),
    "vae/": ("autoencoder.", AUTOENCODER),
    "text_encoder/": FIRST,
    "text_encoder_2/": SECOND,
    "text_encoder_3/": THIRD,
}
FOLDERS = ("transformer", "unet", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
NOT_IN_ALL = ("transformer", "text_encoder_2", "text_encoder_3")
CLIP_SIZES = {
    "hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads", "vocab_size": "vocab_size",
    "max_position_embeddings": "context_length",
}  # fmt: skip
HUB_SIZES = {  # of a sub-folder: our section of the config, and the hub's names and ours
    "unet": ("unet", {
        "in_channels": "in_channels", "out_channels": "out_channels", "layers_per_block": "num_res_blocks",
        "cross_attention_dim": "context_dim", "transformer_layers_per_block": "transformer_depth",
        "projection_class_embeddings_input_dim": "vector_dim",
    }),
    "transformer": ("mmdit", {
        "num_layers": "depth", "qk_norm": "qk_norm", "dual_attention_layers": "dual_attention_layers",
        "pos_embed_max_size": "max_positions", "in_channels": "in_channels", "patch_size": "patch",
        "joint_attention_dim": "context_dim", "pooled_projection_dim": "vector_dim",
    }),
    "vae": ("vae", {
        "layers_per_block": "num_res_blocks", "latent_channels": "z_channels", "scaling_factor": "scale_factor",
        "shift_factor": "shift_factor", "use_quant_conv": "quant_conv",
    }),
    "text_encoder": ("text", CLIP_SIZES),
    "text_encoder_2": ("text_2", CLIP_SIZES | {"projection_dim": "embed_dim"}),
    "text_encoder_3": ("t5", {
        "d_model": "width", "num_layers": "layers", "num_heads": "heads", "d_kv": "head_width", "d_ff": "hidden",
        "vocab_size": "vocab_size",
    }),
    "scheduler": ("schedule", {
        "beta_schedule": "kind", "beta_start": "beta_start", "beta_end": "beta_end", "num_train_timesteps": "timesteps",
        "rescale_betas_zero_snr": "zero_snr", "shift": "shift",
    }),
}  # fmt: skip
# The files keep q, k and v apart, and the networks multiply them in one product.
STACKS = (("to_qkv.", "qkv"), ("to_kv.", "kv"), ("in_proj_", "qkv"))
# Keys of no network: the losses of training, constants, averages (which `ema` chooses), the schedule, and marks.
NO_WEIGHTS = (
    r"^first_stage_model\.loss\.|(^|\.)(position_ids|attn_mask|logit_scale|embed_tokens\.weight)$|^model_ema\."
    r"|^\w*alphas_cumprod|^(betas|logvar|v_pred|ztsnr|scaled_fp8)$|^(posterior_|lvlb_|denoiser\.)"
)

REFINER = "SDXL's refiner, which continues the base model's pictures: give the base model"
OTHERS = {  # models of other kinds, by their keys
    r"(^|[._])lora[._]|\.hada_w": "a LoRA, which is an addition to a model: give the model that it was made into",
    r"^conditioner\.embedders\.0\.model\.": REFINER,
}


def renamed(key: str, sizes: Mapping[str, Any]) -> str | None:
    """Our name for a key of a single file, or "FOLDER/KEY" of a hub folder; None for one outside the networks.

    `sizes` of the whole model: a hub folder numbers blocks within levels, and its decoder's levels from the coarsest;
    ours are numbered one after the other, and from the finest."""
    prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), None)
    if prefix is None or re.search(NO_WEIGHTS, key):
        return None
    part, rules = PREFIXES[prefix]
    key = key.removeprefix(prefix)
    if match := re.match(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?([a-z]+)\.(\d+)\.", key):
        way, level, kind, number = match.groups()
        key = unet_block(way, int(level or 0), kind, int(number), **sizes["unet"]) + key[match.end() :]
    if match := re.match(r"decoder\.up_blocks\.(\d+)\.", key):
        key = f"decoder.up.{len(sizes['vae']['ch_mult']) - 1 - int(match[1])}.{key[match.end() :]}"
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return part + key


def unet_block(way: str, level: int, kind: str, n: int, num_res_blocks, channel_mult, attention_levels, **_) -> str:
    """With r residual blocks, a level takes r + 1 places on the way down, the last one a downsampling, and r + 1 on the
    way up, where upsampling comes after the residual block and the transformer."""
    place, layer = level * (num_res_blocks + 1) + n, int(kind == "attentions")
    if way == "mid":
        return f"middle_block.{2 * n + layer}."
    if way == "down":
        return f"input_blocks.{place + 1 + (num_res_blocks if kind == 'downsamplers' else 0)}.{layer}."
    if kind == "upsamplers":
        place, layer = place + num_res_blocks, 1 + (len(channel_mult) - 1 - level in attention_levels)
    return f"output_blocks.{place}.{layer}."


def members(name: str) -> list[str]:
    """The tensors of which a file makes one of ours: ["attn1.to_q.weight", ...] of "attn1.to_qkv.weight"."""
    for stack, letters in STACKS:
        if stack in name:
            return [name.replace(stack, f"to_{letter}.") for letter in letters]
    return [f"{name}.weight" if name.endswith("text_projection") else name]  # the hub's is a Linear's


def swapped(name: str, sizes: Mapping[str, Any]) -> bool:
    """Whether the hub's tensor has scale and shift where ours has shift and scale: in an MMDiT's last norms."""
    last = sizes.get("mmdit", {}).get("depth", 0) - 1
    return name.startswith(("unet.final_layer.adaLN", f"unet.joint_blocks.{last}.context_block.adaLN"))


SD3 = {
    "vae": KL_F8_16, "text": SDXL_CLIP_L | {"vector": "end"}, "text_2": SDXL_BIG_G, "prediction": "flow",
    "schedule": {"kind": "flow"}, "image_size": 1024,
}  # fmt: skip
FAMILIES = {  # by the keys of its last text tower in a single file, or of its network
    "cond_stage_model.transformer.": {
        "unet": SD1, "vae": KL_F8, "text": CLIP_L, "prediction": "epsilon", "image_size": 512,
    },
    "cond_stage_model.model.": {"unet": SD2, "vae": KL_F8, "text": OPEN_CLIP_H},  # 512 pixels: epsilon, 768: v
    "conditioner.embedders.1.": {
        "unet": SDXL, "vae": KL_F8_XL, "text": SDXL_CLIP_L, "text_2": SDXL_BIG_G, "prediction": "epsilon",
        "image_size": 1024, "empty_is_zero": True,
    },
    "model.diffusion_model.joint_blocks.0.x_block.attn2.": SD3 | {"mmdit": SD35_MEDIUM},
    "model.diffusion_model.joint_blocks.0.x_block.attn.ln_q.": SD3 | {"mmdit": SD35_LARGE},
    "model.diffusion_model.joint_blocks.": SD3 | {"mmdit": SD3_MEDIUM},
}  # fmt: skip


def family(keys: Iterable[str]) -> dict[str, Any]:
    """The sizes of the family that a single file with these keys belongs to. Raises InputError for another file."""
    keys = sorted(keys)
    for pattern, kind in OTHERS.items():
        if found := next((key for key in keys if re.search(pattern, key)), None):
            raise InputError(f"it is {kind} (it has {found})")
    for prefix, sizes in FAMILIES.items():
        network = f"model.diffusion_model.{'input' if 'unet' in sizes else 'joint'}_blocks."
        if all(any(key.startswith(p) for key in keys) for p in (prefix, network)):
            return sizes
    raise InputError(f"it is no whole Stable Diffusion 1.x, 2.x, XL or 3: its keys are {', '.join(keys[:3])}, ...")


def stated(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a single file says of its prediction and schedule, by marks that trainers and tools leave in it, or None."""
    said = metadata.get("modelspec.predict_key", metadata.get("modelspec.prediction_type"))
    prediction = "v" if "v_pred" in tensors else said if said in ("v", "epsilon") else None
    return {"prediction": prediction, "schedule": {"zero_snr": True} if "ztsnr" in tensors else None}


def check(named: Mapping[str, Tensor]) -> None:
    """Raise InputError for a UNet that takes more than the latent, and for a model without an autoencoder."""
    stem = named.get("unet.input_blocks.0.0.weight")
    if stem is not None and stem.shape[1:2] in ((8,), (9,)):
        raise InputError("it is made for inpainting (a mask beside the picture) or instructions: give a plain model")
    if not any(name.startswith("autoencoder.") for name in named):
        raise InputError("it has no autoencoder: name one with model.vae=PATH")
