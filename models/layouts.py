"""Stable Diffusion's weights under this project's names, from the two layouts in which they are handed on: the single
file of the original release, and the model hub's folder. Both name the same layers differently; rules rename them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from errors import InputError

Pieces = dict[str, list[Tensor]]  # our name -> the tensors that make it up, stacked along the first axis

PART_OF = {  # prefix in the single file -> our module
    "model.diffusion_model.": "unet",
    "first_stage_model.": "autoencoder",
    "cond_stage_model.transformer.": "text",  # 1.x, named as in the folder layout
    "cond_stage_model.model.": "text",  # 2.x, open_clip's own names
}
FOLDERS = {"unet": "unet", "vae": "autoencoder", "text_encoder": "text"}
SINGLE_FILE = {
    "unet": [
        (r"\.in_layers\.0\.", ".norm1."),
        (r"\.in_layers\.2\.", ".conv1."),
        (r"\.emb_layers\.1\.", ".time."),
        (r"\.out_layers\.0\.", ".norm2."),
        (r"\.out_layers\.3\.", ".conv2."),
        (r"\.skip_connection\.", ".skip."),
        (r"\.0\.op\.", ".0.conv."),
    ],
    "autoencoder": [
        (r"\.nin_shortcut\.", ".skip."),
        (r"\.(down|up)sample\.conv\.", ".resample.conv."),
        (r"\.attn_1\.(q|k|v)\.", r".attn_1.to_\1."),
        (r"\.attn_1\.proj_out\.", ".attn_1.to_out."),
    ],
    "text": [],
}
FOLDER = {
    "unet": [
        (r"^conv_in\.", "input_blocks.0.0."),
        (r"^conv_norm_out\.", "out.0."),
        (r"^conv_out\.", "out.2."),
        (r"^time_embedding\.linear_1\.", "time_embed.0."),
        (r"^time_embedding\.linear_2\.", "time_embed.2."),
        (r"^mid_block\.resnets\.0\.", "middle_block.0."),
        (r"^mid_block\.attentions\.0\.", "middle_block.1."),
        (r"^mid_block\.resnets\.1\.", "middle_block.2."),
        (r"\.time_emb_proj\.", ".time."),
        (r"\.conv_shortcut\.", ".skip."),
    ],
    "autoencoder": [
        (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
        (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
        (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
        (r"\.attn_1\.group_norm\.", ".attn_1.norm."),
        (r"\.attn_1\.to_out\.0\.|\.attn_1\.proj_attn\.", ".attn_1.to_out."),
        (r"\.attn_1\.(q)uery\.|\.attn_1\.(k)ey\.|\.attn_1\.(v)alue\.", r".attn_1.to_\1\2\3."),  # until 2023
        (r"\.down_blocks\.(\d+)\.", r".down.\1."),
        (r"\.resnets\.", ".block."),
        (r"\.(down|up)samplers\.0\.", ".resample."),
        (r"\.conv_norm_out\.", ".norm_out."),
        (r"\.conv_shortcut\.", ".skip."),
    ],
    "text": [],
}
EITHER = {
    "unet": [
        (r"\.to_out\.0\.", ".to_out."),
        (r"\.ff\.net\.0\.proj\.", ".ff.proj_in."),
        (r"\.ff\.net\.2\.", ".ff.proj_out."),
    ],
    "autoencoder": [],
    "text": [
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
        (r"^", "tower."),
    ],
}
STACKS = [  # what the files keep apart, this project multiplies in one product
    (r"(.*\.(?:attn1|attn_1)\.)to_([qkv])(\..*)", r"\1to_qkv\3", "qkv"),
    (r"(.*\.attn2\.)to_([kv])(\..*)", r"\1to_kv\3", "kv"),
    (r"(.*\.attn\.)to_([qkv])\.(.*)", r"\1in_proj_\3", "qkv"),
]
NO_WEIGHTS = re.compile(  # tables of the schedule, constants, and CLIP's head, which conditioning does not use
    r"(model_ema|first_stage_model\.loss)\..*|betas|(sqrt_|log_)?(one_minus_)?alphas_cumprod(_prev)?|posterior_.*"
    r"|sqrt_recip(m1)?_alphas_cumprod|logvar|lvlb_weights|scale_factor|(.*\.)?position_ids"
    r"|cond_stage_model\.(.*\.)?(attn_mask|logit_scale|text_projection(\.weight)?)|text_projection\.weight"
)


def from_single_file(tensors: Mapping[str, Tensor], ema: bool | None) -> tuple[dict[str, Pieces], list[str]]:
    """The single file's tensors for `unet`, `autoencoder` and `text`, and what is wrong with its keys.

    `ema`: True takes the averaged weights of the UNet, False the plain ones, None the averaged where there are some.
    Raises InputError where True finds none.
    """
    averaged = {key for key in tensors if key.startswith("model_ema.diffusion_model")}
    if ema and not averaged:
        raise InputError("ema=true, and the file holds no averaged weights (model_ema.*): leave ema out")
    parts: dict[str, dict[str, Tensor]] = {"unet": {}, "autoencoder": {}, "text": {}}
    lengths, problems = {}, []
    for key, tensor in tensors.items():
        if NO_WEIGHTS.fullmatch(key):
            continue
        prefix = next((prefix for prefix in PART_OF if key.startswith(prefix)), None)
        if prefix is None:
            problems.append(f"{key} is unexpected")
            continue
        if averaged and ema is not False and prefix == "model.diffusion_model.":
            own = "model_ema." + key.removeprefix("model.").replace(".", "")  # how the averages were registered
            if own not in averaged:
                problems.append(f"{own} is missing")
                continue
            tensor = tensors[own]
        parts[PART_OF[prefix]][key] = tensor
        lengths[key] = len(prefix)
    pieces = {}
    for part, found in parts.items():
        rules = SINGLE_FILE[part] + EITHER[part]
        pieces[part], wrong = renamed(found, lambda key, rules=rules: rewritten(key[lengths[key] :], rules))
        problems += wrong
    return pieces, problems


def from_folder(tensors: Mapping[str, Mapping[str, Tensor]]) -> tuple[dict[str, Pieces], list[str]]:
    """The same from the folder layout, given the tensors of each of its folders (`FOLDERS`)."""
    pieces, problems = {}, []
    for folder, part in FOLDERS.items():
        found = {key: t for key, t in tensors[folder].items() if not NO_WEIGHTS.fullmatch(key)}
        place = PLACES[part](found)
        rules = FOLDER[part] + EITHER[part]
        pieces[part], wrong = renamed(found, lambda key, rules=rules, place=place: rewritten(place(key), rules))
        problems += [f"{folder}: {problem}" for problem in wrong]
    return pieces, problems


def rewritten(name: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def renamed(tensors: Mapping[str, Tensor], name_of: Callable[[str], str]) -> tuple[Pieces, list[str]]:
    """The tensors under our names, those that we stack together; and which members of a stack are missing, or which
    weights come twice."""
    pieces: Pieces = {}
    problems = []
    stacks: dict[str, tuple[str, dict[str, tuple[str, Tensor]]]] = {}
    for key, tensor in tensors.items():
        name = name_of(key)
        if ".attn_1.to_" in name and tensor.ndim == 4:
            tensor = tensor.flatten(1)  # the original autoencoder's attention multiplies by 1x1 convolutions
        for pattern, target, letters in STACKS:
            if match := re.fullmatch(pattern, name):
                members = stacks.setdefault(match.expand(target), (letters, {}))[1]
                twice = match[2] in members
                members[match[2]] = key, tensor
                break
        else:
            twice = name in pieces
            pieces[name] = [tensor]
        if twice:
            problems.append(f"{key} comes twice, under another name as well")
    for name, (letters, members) in stacks.items():
        pieces[name] = [members[letter][1] for letter in letters if letter in members]
        sibling = next(iter(members.values()))[0]
        problems += [f"the {letter} beside {sibling} is missing" for letter in letters if letter not in members]
    return pieces, problems


def unet_blocks(keys: Iterable[str]) -> Callable[[str], str]:
    """The folder counts the UNet's blocks within levels, the single file (and we) one after the other: with n
    residual blocks a level takes n + 1 places on the way down, the last one a downsampling, and n + 1 on the way up."""
    per_level = 1 + max((int(m[1]) for k in keys if (m := re.match(r"down_blocks\.0\.resnets\.(\d+)\.", k))), default=0)
    with_attention = {m[1] for k in keys if (m := re.match(r"up_blocks\.(\d+)\.attentions\.", k))}

    def place(key: str) -> str:
        match = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.", key)
        if not match:
            return key
        way, level, kind, n = match[1], int(match[2]), match[3], int(match[4])
        first = level * (per_level + 1)
        if way == "down":
            n, slot = (first + per_level + 1, 0) if kind == "downsamplers" else (first + n + 1, int(kind != "resnets"))
        elif kind == "upsamplers":
            n, slot = first + per_level, 1 + (match[2] in with_attention)
        else:
            n, slot = first + n, int(kind != "resnets")
        return f"{'input' if way == 'down' else 'output'}_blocks.{n}.{slot}.{key[match.end() :]}"

    return place


def decoder_levels(keys: Iterable[str]) -> Callable[[str], str]:
    """The folder numbers the decoder's levels from the coarsest, the single file (and we) from the finest."""
    last = max((int(m[1]) for k in keys if (m := re.match(r"decoder\.up_blocks\.(\d+)\.", k))), default=0)

    def place(key: str) -> str:
        return re.sub(r"^decoder\.up_blocks\.(\d+)\.", lambda m: f"decoder.up.{last - int(m[1])}.", key)

    return place


PLACES = {"unet": unet_blocks, "autoencoder": decoder_levels, "text": lambda keys: str}
