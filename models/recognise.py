"""The sizes of a Stable Diffusion from its weights, and what an unfit file seems to be.

Shapes tell almost everything. They do not tell into how many heads an attention is split, nor what the UNet was
trained to predict: those come from the folder's config files, from Stable Diffusion's own conventions at its own
widths, or from the user.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from errors import InputError
from models.layouts import Pieces
from models.text import VOCABULARY

Shapes = dict[str, tuple[int, ...]]
UNTOLD = {"num_heads", "num_head_channels", "heads", "quick_gelu", "hidden_layer", "pad_token", "scale_factor"}
INPUTS = {5: "a depth-guided model", 7: "an upscaler", 8: "an InstructPix2Pix", 9: "an inpainting model"}
SECTIONS = ("unet", "vae", "text", "vision", "schedule", "prediction", "image_size")  # of a config
SCHEDULE = {"kind": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timesteps": 1000}


def architecture(pieces: Mapping[str, Pieces]) -> dict[str, Any]:
    """What `models.build` needs, from the renamed weights of `unet`, `autoencoder` and `text`, as far as it shows:
    head counts are left out where the widths are not Stable Diffusion's own, and `prediction` for 2.x.

    Raises InputError where a part lacks what makes it one.
    """
    if absent := [part for part, found in pieces.items() if not found]:
        raise InputError(f"it holds no weights of the {' and the '.join(absent)}")
    shapes = {part: {name: stacked_shape(tensors) for name, tensors in found.items()} for part, found in pieces.items()}
    try:
        unet, text = unet_sizes(shapes["unet"]), text_sizes(shapes["text"])
        arch = {"unet": unet, "vae": autoencoder_sizes(shapes["autoencoder"]), "text": text}
    except KeyError as error:
        raise InputError(f"{error.args[0]} is missing") from None
    except (ValueError, ZeroDivisionError, IndexError):
        raise InputError("the shapes of its weights are not those of Stable Diffusion") from None
    first = not unet["use_linear_projection"]  # 1.x
    if unet["model_channels"] == 320:
        unet |= {"num_heads": 8} if first else {"num_head_channels": 64}
    if unet["in_channels"] != arch["vae"]["z_channels"]:
        kind = INPUTS.get(unet["in_channels"], "another kind of model")
        raise InputError(f"its UNet takes {unet['in_channels']} channels, so it seems to be {kind}: not supported")
    if text["width"] % 64 == 0 and text["width"] >= 512:
        text["heads"] = text["width"] // 64
    text |= (
        {"quick_gelu": True, "hidden_layer": "last", "pad_token": end_token(text)}
        if first
        else {"quick_gelu": False, "hidden_layer": "penultimate", "pad_token": 0}
    )
    if text["width"] == 1024 and text["layers"] == 23:  # 2.x has 24: a converter left out the one that does not count
        text["hidden_layer"] = "last"
    return arch | {"schedule": dict(SCHEDULE)} | ({"prediction": "epsilon", "image_size": 512} if first else {})


def stacked_shape(tensors: list[Tensor]) -> tuple[int, ...]:
    return (sum(len(t) for t in tensors), *tensors[0].shape[1:]) if tensors[0].ndim else ()


def end_token(text: Mapping[str, Any]) -> int:
    """The end token is the last word of the vocabulary; rows that were added behind are not CLIP's."""
    return min(text["vocab_size"], VOCABULARY) - 1


def count(shapes: Shapes, pattern: str) -> int:
    """One more than the largest number that the pattern's group takes in a name."""
    return 1 + max((int(m[1]) for name in shapes if (m := re.match(pattern, name))), default=-1)


def unet_sizes(shapes: Shapes) -> dict[str, Any]:
    width, in_channels = shapes["input_blocks.0.0.weight"][:2]
    mults, blocks, depths = [], [0], []
    for i in range(1, count(shapes, r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{i}.0.conv.weight" in shapes:  # a downsampling ends its level
            blocks.append(0)
            continue
        channels = shapes[f"input_blocks.{i}.0.conv1.weight"][0]
        if blocks[-1] == 0:
            mults.append(channels // width)
            depths.append(count(shapes, rf"input_blocks\.{i}\.1\.transformer_blocks\.(\d+)\."))
        blocks[-1] += 1
    middle = count(shapes, r"middle_block\.1\.transformer_blocks\.(\d+)\.")
    levels = [level for level, depth in enumerate(depths) if depth]
    depth = [d or middle for d in depths]
    sizes = {
        "in_channels": in_channels,
        "out_channels": shapes["out.2.weight"][0],
        "model_channels": width,
        "channel_mult": mults,
        "num_res_blocks": blocks[0],
        "transformer_depth": depth[0] if len(set([*depth, middle])) == 1 else depth,
        "context_dim": shapes["middle_block.1.transformer_blocks.0.attn2.to_kv.weight"][1],
        "use_linear_projection": len(shapes["middle_block.1.proj_in.weight"]) == 2,
    }
    return sizes if levels == list(range(len(mults) - 1)) else sizes | {"attention_levels": levels}


def autoencoder_sizes(shapes: Shapes) -> dict[str, Any]:
    ch = shapes["encoder.conv_in.weight"][0]
    levels = range(count(shapes, r"encoder\.down\.(\d+)\."))
    return {
        "ch": ch,
        "ch_mult": [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] // ch for i in levels],
        "num_res_blocks": count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        "z_channels": shapes["post_quant_conv.weight"][0],
        "scale_factor": 0.18215,
    }


def text_sizes(shapes: Shapes) -> dict[str, Any]:
    vocab_size, width = shapes["tower.token_embedding.weight"]
    return {
        "width": width,
        "layers": count(shapes, r"tower\.transformer\.resblocks\.(\d+)\."),
        "vocab_size": vocab_size,
        "context_length": shapes["tower.positional_embedding"][0],
    }


def configured(arch: dict[str, Any], configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """`arch` with what the config files of the folder layout add: `configs` holds those of unet, vae, text_encoder,
    scheduler and tokenizer, {} for one that is not there. Raises InputError for a kind that is not supported."""
    unet, text, vae = dict(arch["unet"]), dict(arch["text"]), dict(arch["vae"])
    if configs["unet"]:
        refuse(
            configs["unet"],
            "unet",
            **dict.fromkeys(("addition_embed_type", "class_embed_type", "encoder_hid_dim_type"), None),
            **dict.fromkeys(("dual_cross_attention", "only_cross_attention", "center_input_sample"), False),
            act_fn="silu",
            flip_sin_to_cos=True,
            freq_shift=0,
            norm_num_groups=32,
            resnet_time_scale_shift="default",
            time_embedding_type="positional",
        )
        # In this file "attention_head_dim" is, against its name, the number of heads, in all levels or in each.
        heads = configs["unet"].get("num_attention_heads") or configs["unet"].get("attention_head_dim") or 8
        unet = {key: value for key, value in unet.items() if key not in ("num_heads", "num_head_channels")}
        unet |= heads_of(heads, [mult * unet["model_channels"] for mult in unet["channel_mult"]])
    # The folder's text encoder ends with the layer that conditions: 2.x is stored without the one that it skips.
    text["hidden_layer"] = "last"
    if configs["text_encoder"]:
        refuse(configs["text_encoder"], "text_encoder", hidden_act=("quick_gelu", "gelu"))
        text["quick_gelu"] = configs["text_encoder"].get("hidden_act", "quick_gelu") == "quick_gelu"
        text["heads"] = configs["text_encoder"].get("num_attention_heads", text.get("heads"))
    pad = configs["tokenizer"].get("pad_token")
    pad = pad.get("content") if isinstance(pad, Mapping) else pad
    if pad is not None:
        text["pad_token"] = 0 if pad == "!" else end_token(text)
    refuse(configs["vae"], "vae", act_fn="silu", norm_num_groups=32, shift_factor=None, latents_mean=None)
    vae["scale_factor"] = configs["vae"].get("scaling_factor", vae["scale_factor"])
    arch = arch | {"unet": unet, "text": text, "vae": vae}
    if isinstance(side := configs["unet"].get("sample_size"), int):
        arch["image_size"] = side * 2 ** (len(vae["ch_mult"]) - 1)
    return arch | (scheduled(configs["scheduler"]) if configs["scheduler"] else {})


def heads_of(heads: int | list[int], widths: list[int]) -> dict[str, Any]:
    if isinstance(heads, int):
        return {"num_heads": heads}
    if not isinstance(heads, list) or len(heads) != len(widths) or not all(isinstance(n, int) and n > 0 for n in heads):
        raise InputError(f"unet: attention_head_dim={heads} is neither a number of heads nor one for each level")
    per_head = {width // n for width, n in zip(widths, heads, strict=True)}
    return {"num_head_channels": per_head.pop()} if len(per_head) == 1 else {"num_heads": heads}


def scheduled(config: Mapping[str, Any]) -> dict[str, Any]:
    """The schedule and the prediction type of a scheduler_config.json."""
    refuse(
        config,
        "scheduler",
        prediction_type=("epsilon", "v_prediction"),
        beta_schedule=("scaled_linear", "linear"),
        trained_betas=None,
        rescale_betas_zero_snr=False,
    )
    return {
        "schedule": {
            "kind": config.get("beta_schedule", "linear"),
            "beta_start": config.get("beta_start", 0.0001),
            "beta_end": config.get("beta_end", 0.02),
            "timesteps": config.get("num_train_timesteps", 1000),
        },
        "prediction": "v" if config.get("prediction_type") == "v_prediction" else "epsilon",
    }


def refuse(config: Mapping[str, Any], folder: str, **supported: Any) -> None:
    """Raise InputError where a setting is there and is none of those supported."""
    for name, values in supported.items():
        if name in config and config[name] not in (values if isinstance(values, tuple) else (values,)):
            raise InputError(f"{folder}: {name}={config[name]} is not supported")


def merged(told: dict[str, Any], arch: Mapping[str, Any] | None, sure: Collection[str]) -> dict[str, Any]:
    """`told` by the weights and the configs, with what the user's `arch` adds or corrects.

    Raises InputError where `arch` contradicts one of the sections that are `sure`, names one that there is not, and
    where neither says the heads or the prediction.
    """
    result = {key: dict(value) if isinstance(value, Mapping) else value for key, value in told.items()}
    for section, given in (arch or {}).items():
        if section not in (*SECTIONS, "guidance_scale"):  # arch.json of a checkpoint may suggest that
            raise InputError(f"arch.{section} is unknown: choose from {', '.join(SECTIONS)}")
        nested = section not in ("prediction", "image_size", "guidance_scale")
        if isinstance(given, Mapping) != nested:
            raise InputError(f"arch.{section} is {given!r}: it must {'name sizes' if nested else 'be one value'}")
        if not nested:
            if section in sure and section != "image_size" and given != (own := result.get(section, given)):
                raise InputError(f"arch.{section} is {given}, and the model has {own}: set model.arch.{section}={own}")
            result[section] = given
            continue
        own = result.get(section, {})
        for name, value in given.items():
            value = list(value) if isinstance(value, tuple) else value
            if section in sure and name not in UNTOLD and own.get(name, value) != value:
                hint = family(told) if name == "use_linear_projection" else ""
                raise InputError(f"arch.{section}.{name} is {value}, and the model has {own[name]}{hint}")
        if {"num_heads", "num_head_channels"} & set(given):
            own = {key: v for key, v in own.items() if key not in ("num_heads", "num_head_channels")}
        result[section] = own | dict(given)
    if not {"num_heads", "num_head_channels"} & set(result["unet"]):
        raise InputError(
            "weights of this width do not tell the UNet's heads: give arch={'unet': {'num_heads': ...}} or "
            "'num_head_channels'"
        )
    if not result["text"].get("heads"):
        raise InputError("weights of this width do not tell the text's heads: give arch={'text': {'heads': ...}}")
    if "prediction" not in result:
        raise InputError(
            "it is a Stable Diffusion 2.x, whose weights do not tell what they predict: say model=sd21 (768 pixels, "
            "v), model=sd21_base or sd20_base (512, epsilon), or arch={'prediction': 'v'} or 'epsilon'"
        )
    result.setdefault("image_size", 768 if result["prediction"] == "v" else 512)
    return result


def family(arch: Mapping[str, Any]) -> str:
    linear = arch["unet"].get("use_linear_projection")
    choices = "sd20_base, sd21_base or sd21" if linear else "sd14 or sd15"
    return f": it seems to be a Stable Diffusion {'2' if linear else '1'}.x (model={choices})"


WHOLE = ("model.diffusion_model.input_blocks.", "first_stage_model.", "cond_stage_model.")
KINDS = [  # (a key's pattern, what holds it); the first that fits is named
    (r".*(lora|hada_w|lokr_)", "a LoRA, which adds to a model and is none"),
    (r"conditioner\.embedders\.", "an SDXL checkpoint, which is not supported: Stable Diffusion 1.x and 2.x are"),
    (r".*(joint_blocks|double_blocks|attn\.add_q_proj)\.", "a diffusion transformer such as SD3 or Flux"),
    (r"control_model\.|controlnet_|.*\.zero_convs\.", "a ControlNet, which steers a model and is none"),
    (r"(emb_params|string_to_param|\*|clip_[lg])$", "a textual inversion embedding, which adds to a model and is none"),
    (r"(text\.tower|visual)\.", "one part of a folder of this project: give the folder"),
    (r"(conv_in|down_blocks|mid_block|up_blocks)\.", "the UNet of a hub folder: give the folder above it"),
    (r"(text_model|encoder\.layers|embeddings)\.", "the text encoder of a hub folder: give the folder above it"),
    (r"(encoder|decoder|quant_conv|post_quant_conv)\.", "an autoencoder alone: give the whole model"),
    (r"(input_blocks|middle_block|output_blocks)\.", "a UNet alone: give the whole model"),
]


def foreign(tensors: Mapping[str, Tensor]) -> str | None:
    """What tensors of these names seem to be, where they are no Stable Diffusion 1.x or 2.x; None where they may."""
    if all(any(key.startswith(prefix) for key in tensors) for prefix in WHOLE):
        return None
    for pattern, kind in KINDS:
        if any(re.match(pattern, key) for key in tensors):
            return f"it seems to be {kind}"
    if any(key.startswith("model.diffusion_model.") for key in tensors):
        return None
    first = ", ".join(sorted(tensors)[:3])
    return f"it holds no Stable Diffusion; its keys begin with {first}" if tensors else "it holds no tensors"
