"""Loading and saving models: this project's own folder, and Stable Diffusion's single file.

A folder holds `config.json` (all sizes, readable) and one safetensors file for each part that is trained on its own:
`autoencoder`, `clip` (text and image towers) and `unet`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from errors import InputError
from files import whole_file
from models.latent_diffusion import LatentDiffusion, build

PARTS = ("autoencoder", "clip", "unet")
SECTIONS_OF = {"autoencoder": ["vae"], "clip": ["text", "vision"], "unet": ["unet", "schedule", "prediction"]}


def load(
    path: str | os.PathLike,
    arch: Mapping | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> LatentDiffusion:
    """The model in `path`: a folder written by `save`, or a Stable Diffusion file (.safetensors) with its sizes in
    `arch`. Raises InputError for a path that is missing, incomplete, damaged or does not fit its sizes."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"there is no checkpoint at {path}")
    if path.is_dir():
        config = read_config(path)
        states = {part: read_part(path, part) for part in PARTS}
        model = build_from(config, path / "config.json", vocabulary=states["clip"].get("text.vocabulary"))
        for part, state in states.items():
            fill(part_of(model, part), state, path / f"{part}.safetensors")
    else:
        if arch is None:
            raise InputError(f"{path} is a single file: give the sizes of its networks as arch={{...}}")
        model = build_from(arch, "arch")
        for name, state in split_stable_diffusion(read_tensors(path)).items():
            fill(getattr(model, name), state, path)
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


def build_from(config: Mapping, source: str | Path, vocabulary: Tensor | None = None) -> LatentDiffusion:
    """`build`, where the sizes are a user's: what they lack or cannot be is an InputError that names `source`."""
    try:
        return build(config, vocabulary=vocabulary)
    except KeyError as error:
        raise InputError(f"{source} lacks {error}") from None
    except (TypeError, ValueError, AssertionError) as error:  # torch asserts what its layers are given
        raise InputError(f"{source} describes no network that can be built: {error}") from None


def save(model: LatentDiffusion, path: str | os.PathLike, dtype: torch.dtype | None = torch.float16) -> None:
    """Write the model's folder: weights in `dtype` (None: as they are), the config last."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        save_part(part_of(model, part), path, part, dtype)
    write_config(model.config, path)


def part_of(model: LatentDiffusion, part: str) -> nn.Module:
    """The module stored under a part's name. A model without an image tower stores its text encoder alone."""
    if part == "clip":
        return model.clip or nn.ModuleDict({"text": model.text})
    return getattr(model, part)


def save_part(module: nn.Module, path: Path, part: str, dtype: torch.dtype | None = torch.float16) -> None:
    """Write one part's safetensors file."""
    state = {
        name: (t.to(dtype) if dtype and t.is_floating_point() else t).contiguous().cpu()
        for name, t in module.state_dict().items()
    }
    with whole_file(path / f"{part}.safetensors") as partial:
        save_file(state, partial)


def export_part(model: LatentDiffusion, module: nn.Module, path: Path, part: str) -> None:
    """Write one part of a folder whose parts are trained one by one: `module`'s weights in half precision, and those
    sections of the model's config that describe it. What the config says of the other parts stays."""
    save_part(module, path, part)
    stored = read_config(path) if (path / "config.json").exists() else {}
    own = {section: model.config[section] for section in SECTIONS_OF[part] if section in model.config}
    write_config({**model.config, **stored, **own}, path)


def write_config(config: Mapping, path: Path) -> None:
    with whole_file(path / "config.json") as partial:
        partial.write_text(json.dumps(dict(config), indent=1) + "\n")


def read_config(path: Path) -> dict:
    """The sizes in a folder's `config.json`."""
    try:
        return json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        raise InputError(f"{path} holds no config.json, so it is not one of this project's checkpoints") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path / 'config.json'} is not JSON: {error}") from None


def read_part(path: Path, part: str) -> dict[str, Tensor]:
    """The weights of one part of a folder."""
    file = path / f"{part}.safetensors"
    if not file.exists():
        raise InputError(f"{path} lacks {file.name}: train it with `python train.py part={part}`")
    return read_tensors(file)


def read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise InputError(f"{file} is damaged or no safetensors file: {error}") from None


def fill(module: nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    """Copy `state` into the module. Raises InputError that names the first keys that are missing, unexpected or of
    another shape, and counts them."""
    own = module.state_dict()
    problems = [f"{k} is missing" for k in own if k not in state]
    problems += [f"{k} is unexpected" for k in state if k not in own]
    problems += [
        f"{k} is {tuple(state[k].shape)} where {tuple(own[k].shape)} fits"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InputError(f"{source} does not fit the networks: {'; '.join(problems[:3])}{more}")
    module.load_state_dict(state)


# Stable Diffusion's released files name the same layers differently. A rule renames; `fuse` joins projections.
SECTIONS = {  # prefix in the file -> our module
    "model.diffusion_model.": "unet",
    "first_stage_model.": "autoencoder",
    "cond_stage_model.transformer.text_model.": "text",  # 1.x, in the layout of another library
    "cond_stage_model.model.": "text",  # 2.x, open_clip's own
}
RULES = {
    "unet": [
        (r"\.in_layers\.0\.", ".norm1."),
        (r"\.in_layers\.2\.", ".conv1."),
        (r"\.emb_layers\.1\.", ".time."),
        (r"\.out_layers\.0\.", ".norm2."),
        (r"\.out_layers\.3\.", ".conv2."),
        (r"\.skip_connection\.", ".skip."),
        (r"\.0\.op\.", ".0.conv."),
        (r"\.to_out\.0\.", ".to_out."),
        (r"\.ff\.net\.0\.proj\.", ".ff.proj_in."),
        (r"\.ff\.net\.2\.", ".ff.proj_out."),
    ],
    "autoencoder": [
        (r"\.nin_shortcut\.", ".skip."),
        (r"\.(down|up)sample\.conv\.", ".resample.conv."),
        (r"\.attn_1\.(q|k|v)\.", r".attn_1.to_\1."),
        (r"\.attn_1\.proj_out\.", ".attn_1.to_out."),
    ],
    "text": [
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
FUSED = [  # several of the file's matrices, stacked, are one of ours
    (r"(.*\.attn1\.|.*\.attn_1\.)to_([qkv])(\..*)", r"\1to_qkv\3"),
    (r"(.*\.attn2\.)to_([kv])(\..*)", r"\1to_kv\3"),
    (r"(.*\.attn\.)to_([qkv])\.(.*)", r"\1in_proj_\3"),
]
NOT_WEIGHTS = re.compile(r"embeddings\.position_ids|attn_mask|logit_scale|text_projection")


def split_stable_diffusion(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A Stable Diffusion state dict -> our state dicts for `unet`, `autoencoder` and `text`."""
    parts: dict[str, dict[str, Tensor]] = {"unet": {}, "autoencoder": {}, "text": {}}
    stacks: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in state.items():
        prefix = next((p for p in SECTIONS if key.startswith(p)), None)
        if prefix is None or NOT_WEIGHTS.search(key):
            continue  # the schedule's tables and what conditioning does not use
        part, name = SECTIONS[prefix], key[len(prefix) :]
        for pattern, replacement in RULES[part]:
            name = re.sub(pattern, replacement, name)
        for pattern, target in FUSED:
            if match := re.fullmatch(pattern, name):
                if tensor.ndim == 4:
                    tensor = tensor.flatten(1)  # the autoencoder's 1x1 convolutions
                stacks.setdefault((part, match.expand(target)), {})[match[2]] = tensor
                break
        else:
            if ".attn_1.to_out.weight" in name:
                tensor = tensor.flatten(1)
            parts[part][name] = tensor
    for (part, name), members in stacks.items():
        parts[part][name] = torch.cat([members[m] for m in sorted(members, key="qkv".index)])
    return parts
