"""Loading and saving models: this project's own folder, and published checkpoints as files, hub folders and hub ids.

A folder of this project holds `config.json` (all sizes, readable) and one safetensors file for each part that is
trained on its own: `autoencoder`, `clip` (text and image towers) and `unet`. A checkpoint is read in one pass: each key
is renamed once (models/names.py), and each tensor is cast once, into a network that was built on the meta device.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from errors import InputError
from files import whole_file
from models import names
from models.latent_diffusion import LatentDiffusion, build
from models.t5 import T5, read_tokenizer

PARTS = ("autoencoder", "clip", "unet")
SECTIONS = (
    "unet",
    "mmdit",
    "vae",
    "text",
    "text_2",
    "t5",
    "vision",
    "schedule",
    "prediction",
    "image_size",
    "empty_prompt",
)
SECTIONS_OF = {"autoencoder": ["vae"], "clip": ["text", "vision"], "unet": ["unet", "schedule", "prediction"]}
SPIECE = "tokenizer_3/spiece.model"  # T5's tokenizer in a hub folder
ENDINGS = ("model.safetensors", "model.bin", "model.fp16.safetensors", "model.fp16.bin")  # of weights, best first
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}  # the hub's names and ours
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # org/name

Opened = tuple[dict[str, Any], dict[str, Tensor]]  # a model's sizes, and its weights by our names


def load(
    path: str | os.PathLike,
    arch: Mapping | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    ema: bool | None = None,
    text: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    tokenizer: str | os.PathLike | None = None,
) -> LatentDiffusion:
    """The model at `path`: a folder written by `save`, or a Stable Diffusion 1.x or 2.x as a single file (.safetensors,
    .ckpt), as a folder in the model hub's layout, or as a hub id ("org/name"), which is fetched once.

    `arch` gives sizes that differ from the family's, in the form of config.json. `ema` chooses between the UNet's
    averaged weights (True) and the plain ones (False) where a single file has both; None takes the averaged if there
    are some. A CLIP with an image tower stays in float32, so that its scores do not depend on a half-precision `dtype`.
    On a CPU, weights that need no cast stay mapped to their file: each page is read when it is used.

    `text` names files, or a hub folder, with the text encoders that a single file of a Stable Diffusion 3 lacks, and
    `tokenizer` T5's sentencepiece model, where no hub folder brings it. Without T5 it works on zeros, with a warning.

    Raises InputError for a path that is missing, incomplete, damaged, of another kind or at odds with `arch`.
    """
    source = Path(path)
    if not source.exists():
        if not HUB_ID.fullmatch(str(path)) or source.suffix in (".safetensors", ".ckpt"):
            raise InputError(f"there is no checkpoint at {path}")
        source = fetch(str(path))
    try:
        if source.is_file():
            config, named = open_single_file(source, arch, ema, text)
        elif text:
            raise InputError("model.text is for a Stable Diffusion 3 in a single file")
        elif (source / "config.json").exists():
            config, named = open_own_folder(source, arch)
        else:
            config, named = open_hub_folder(source, arch)
        model = build(config, vocabulary=named.get("clip.text.vocabulary"), meta=True)
        parts = nn.ModuleDict({part: part_of(model, part) for part in PARTS})
        parts.load_state_dict(fitted(parts.state_dict(), unscaled(named, dtype)), assign=True)
    except InputError as error:
        raise error if str(source) in str(error) else InputError(f"{source}: {error}") from None
    except (KeyError, TypeError, ValueError, AssertionError) as error:  # torch asserts the sizes of its layers
        raise InputError(f"{source}: its sizes describe no network of a Stable Diffusion ({error!r})") from error
    for module in (model.autoencoder, model.unet, *([model.clip] if model.clip else model.towers.values())):
        half = torch.bfloat16 if isinstance(module, T5) and dtype == torch.float16 else dtype  # float16 overflows in T5
        module.to(device, torch.promote_types(dtype, torch.float32) if module is model.clip else half)
    if "t5" in config:
        folders = [Path(folder) for folder in (source, text) if isinstance(folder, str | os.PathLike)]
        found = [tokenizer] if tokenizer else [folder / SPIECE for folder in folders if (folder / SPIECE).exists()]
        model.towers["t5"].tokenizer = read_tokenizer(Path(found[0])) if found else None
    elif "mmdit" in config:
        warnings.warn("T5 is not there, and zeros stand for its states: model.text=PATH adds it", stacklevel=2)
    return model.eval().requires_grad_(False)


def open_own_folder(path: Path, arch: Mapping | None) -> Opened:
    """A folder of this project."""
    named = {f"{part}.{key}": tensor for part in PARTS for key, tensor in read_part(path, part).items()}
    return configured({}, read_config(path), arch), named


def open_single_file(path: Path, arch: Mapping | None, ema: bool | None, text: Any = None) -> Opened:
    """A Stable Diffusion in one file, or of whose text encoders some are in the files or the hub folder `text`."""
    tensors, named = read_tensors(path), {}
    family = names.family(tensors)
    for file in [] if text is None else [text] if isinstance(text, str | os.PathLike) else text:
        tensors |= read_text_encoders(Path(file), (arch or {}).get("text", family["text"]).get("width", 0))
    if "mmdit" in family and not all(any(key.startswith(t) for key in tensors) for t in names.TOWERS[:2]):
        raise InputError("it has no CLIP text encoders: give model.text=PATH, files or a folder of the hub's layout")
    t5 = {"t5": {}} if any(key.startswith(names.TOWERS[2]) for key in tensors) else {}
    config = configured(family, t5, arch)
    averaged = any(key.startswith("model_ema.diffusion_model") for key in tensors) if ema is None else ema
    for key in tensors:
        name, stored = names.from_single_file(key), key
        layer = re.match(r"clip\.(text\w*)\.tower\.transformer\.resblocks\.(\d+)\.", name or "")
        if name is None or (layer and int(layer[2]) >= config[layer[1]]["layers"]):
            continue
        if averaged and name.startswith("unet."):
            stored = "model_ema." + key.removeprefix("model.").replace(".", "")  # as the averages were registered
            if stored not in tensors:
                raise InputError(f"{stored} is missing: ema=false takes the plain weights")
        named[name] = tensors[stored]
    return config, named


def open_hub_folder(path: Path, arch: Mapping | None) -> Opened:
    """A Stable Diffusion in a folder of the hub's layout."""
    files, named = weight_files([f"{file.parent.name}/{file.name}" for file in path.glob("*/*")]), {}
    family = names.FAMILIES["conditioner.embedders.1."] if "text_encoder_2" in files else {}
    family = names.SD3 if "transformer" in files else family
    config = configured(family, hub_sizes(path, files), arch)
    for part, file in ((part, file) for part, shards in files.items() for file in shards):
        named |= {names.from_hub(part, key, config): tensor for key, tensor in read_tensors(path / file).items()}
    named.pop(None, None)  # of keys that are no weights
    for name in [name for name in named if names.swapped(name, config)]:
        named[name] = torch.cat(named[name].chunk(2)[::-1])
    return config, named


def read_text_encoders(path: Path, width: int) -> dict[str, Tensor]:
    """The text encoders in a file or in a hub folder, by the keys of SD3's single file. Of two CLIPs that do not name
    themselves, the one of `width` is the first. Raises InputError where there is none."""
    if path.is_dir():
        files = weight_files([f"{file.parent.name}/{file.name}" for file in path.glob("*/*")], names.TOWER_FOLDERS)
        parts = [(folder, read_tensors(path / file)) for folder, shards in files.items() for file in shards]
        prefixes = dict(zip(names.TOWER_FOLDERS, names.TOWERS, strict=True))
        return {prefixes[folder] + key: tensor for folder, tensors in parts for key, tensor in tensors.items()}
    tensors = read_tensors(path) if path.exists() else {}
    if any(key.startswith(names.TOWERS) for key in tensors):
        return {key: tensor for key, tensor in tensors.items() if key.startswith(names.TOWERS)}
    norm = tensors.get("text_model.final_layer_norm.weight")
    if norm is None and "shared.weight" not in tensors:
        raise InputError(f"model.text: there is no text encoder of a Stable Diffusion 3 at {path}")
    prefix = names.TOWERS[2 if norm is None else 0 if len(norm) == width else 1]
    return {prefix + key: tensor for key, tensor in tensors.items()}


def unscaled(named: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors as they are, but float8 ones in `dtype`, times the scale that is stored beside some of them."""
    out = {}
    for name, tensor in named.items():
        stem, _, kind = name.rpartition(".")
        if kind in ("scale_weight", "weight_scale", "scale_input", "input_scale", "scaled_fp8"):
            continue
        if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            tensor = tensor.to(dtype)
        scale = named.get(f"{stem}.scale_weight", named.get(f"{stem}.weight_scale")) if kind == "weight" else None
        if scale is not None and scale.numel():
            scale = scale.float().reshape(-1, *[1] * (tensor.ndim - 1))  # one number, or one for each row
            tensor = (tensor.float() * scale).to(dtype)
        out[name] = tensor
    return out


def fitted(own: Mapping[str, Tensor], named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of `own`'s names and shapes from the `named` tensors, those that belong together stacked. Raises
    InputError with the first three that are missing, unexpected or of another shape."""
    state, problems, left = {}, [], dict(named)
    for name, wanted in own.items():
        members = [name] if name in left else names.members(name)
        pieces = [left.pop(member) for member in members if member in left]
        if len(pieces) < len(members):
            problems.append(f"{name} is missing")
            continue
        tensor = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        if members == [f"{name}.weight"]:
            tensor = tensor.mT  # a Linear's weight where open_clip multiplies from the right
        if tensor.ndim == 4 and wanted.ndim == 2:
            tensor = tensor.flatten(1)  # a 1x1 convolution on pixels is a Linear
        if tensor.shape != wanted.shape:
            problems.append(f"{name} is {[*tensor.shape]} where {[*wanted.shape]} fits")
        state[name] = tensor
    # CLIP's projection, which only a tower with a vector uses, may be there.
    problems += [f"{name} is unexpected" for name in left if ".text_projection" not in name]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InputError(f"it does not fit the networks: {'; '.join(problems[:3])}{more}")
    return state


# --- sizes ---------------------------------------------------------------------------------------------------------


def configured(family: Mapping, stated: Mapping, arch: Mapping | None) -> dict[str, Any]:
    """The sizes of a family, then those that the checkpoint states, then the user's `arch`.

    Raises InputError for an unknown section, for a prediction that the checkpoint contradicts, and for none.
    """
    arch, config = arch or {}, {"schedule": {}}
    if arch.get("prediction", said := stated.get("prediction")) != said and said:
        raise InputError(f"arch.prediction is {arch['prediction']}, and the checkpoint says {said}")
    for given in (family, stated, arch):
        for section, values in given.items():
            if section not in SECTIONS:
                raise InputError(f"arch.{section} is unknown: choose from {', '.join(SECTIONS)}")
            config[section] = {**config.get(section, {}), **values} if isinstance(values, Mapping) else values
    if "prediction" not in config:
        raise InputError("nothing says what it predicts: give arch.prediction, epsilon (512 pixels) or v (768 pixels)")
    return {"image_size": 768 if config["prediction"] == "v" else 512} | config


def hub_sizes(path: Path, folders: Iterable[str]) -> dict[str, Any]:
    """The sizes that the config files of a hub folder with these sub-folders state."""
    folders = {*folders, "scheduler"}
    files = {file: read_config(path, file) for file in names.HUB_SIZES if file.split("/")[0] in folders}
    stated: dict[str, Any] = {
        section: {ours: files[file][theirs] for theirs, ours in table.items() if files[file].get(theirs) is not None}
        for file, (section, table) in names.HUB_SIZES.items()
        if file in files
    }
    network = "mmdit" if "mmdit" in stated else "unet"
    unet, vae, scheduler = (files[names.HUB_FILE[part]] for part in (network, "vae", "schedule"))
    ch = vae["block_out_channels"]
    stated["image_size"] = unet["sample_size"] * 2 ** (len(ch) - 1)
    stated["vae"] |= {"ch": ch[0], "ch_mult": [width // ch[0] for width in ch]}
    for section in {"text", "text_2"} & set(stated):
        quick = files[names.HUB_FILE[section]].get("hidden_act", "quick_gelu") == "quick_gelu"  # OpenAI's
        stated[section] |= {"quick_gelu": quick, "pad_token": "end" if quick else 0}
    if "mmdit" in stated:
        stated["mmdit"]["qk_norm"], stated["schedule"]["kind"] = "qk_norm" in stated["mmdit"], "flow"
        return stated | {"prediction": "flow"}
    widths = unet["block_out_channels"]
    stated["unet"] |= {
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "attention_levels": [i for i, kind in enumerate(unet["down_block_types"]) if "CrossAttn" in kind],
        # "attention_head_dim" is, against its name, the number of heads, in all levels or in each.
        "num_heads": unet.get("num_attention_heads") or unet["attention_head_dim"],
    }
    if (path / "model_index.json").exists() and "text_2" in stated:
        zeros = read_config(path, "model_index.json").get("force_zeros_for_empty_prompt", True)
        stated["empty_prompt"] = "zeros" if zeros else "encoded"
    prediction = scheduler.get("prediction_type", "epsilon")  # 1.4's config has none
    if prediction not in PREDICTIONS or scheduler.get("rescale_betas_zero_snr"):
        raise InputError("its scheduler is not supported: epsilon or v_prediction, with betas that are not rescaled")
    return stated | {"prediction": PREDICTIONS[prediction]}


# --- files ---------------------------------------------------------------------------------------------------------


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors or a PyTorch file (.ckpt, .bin) on the CPU, mapped; nothing in it is executed.
    Raises InputError for a file that is damaged or of another kind."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    except Exception as error:  # the readers have many
        why = "it is damaged, cut short, or a pickle that could run code: take a whole .safetensors file"
        raise InputError(f"{file} cannot be read ({type(error).__name__}): {why}") from None
    content = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    return {name: t for name, t in content.items() if isinstance(t, Tensor)}


# --- the model hub -------------------------------------------------------------------------------------------------


def weight_files(files: Sequence[str], folders: Iterable[str] = names.HUB) -> dict[str, list[str]]:
    """The weights of each of the `folders` among the `files` ("unet/...") of a hub folder, by the order of `ENDINGS`;
    those of a large network are in several files. Raises InputError where a sub-folder has none."""
    chosen, whole = {}, {file: re.sub(r"-\d{5}-of-\d{5}", "", file) for file in files}
    for part in folders:
        found = [file for end in ENDINGS for file in files if file.startswith(f"{part}/") and whole[file].endswith(end)]
        if found:
            chosen[part] = sorted(file for file in found if whole[file] == whole[found[0]])
        elif part not in names.NOT_IN_ALL or (part == "transformer" and "unet" not in chosen):
            what = "unet" if part == "transformer" else part
            raise InputError(f"there are no weights in {what}/, and no config.json of this project")
    return chosen


def fetch(repo_id: str) -> Path:
    """The folder of "org/name" in huggingface_hub's cache, with the files that a model needs. A whole copy serves as it
    is; else they are downloaded. Raises InputError where that fails."""
    from huggingface_hub import list_repo_files, snapshot_download

    with suppress(OSError, InputError):  # it is not cached, or not whole
        folder = Path(snapshot_download(repo_id, local_files_only=True))
        weight_files([f"{file.parent.name}/{file.name}" for file in folder.glob("*/*")])
        return folder
    try:
        files = weight_files(list_repo_files(repo_id)).values()
        return Path(snapshot_download(repo_id, allow_patterns=["*.json", SPIECE, *chain(*files)]))
    except InputError as error:
        raise InputError(f"{repo_id}: {error}") from None
    except Exception as error:  # the hub's own, and those of three libraries below it
        why = f"the hub does not give it ({type(error).__name__}): log in with `hf auth login` if it is closed"
        raise InputError(f"{repo_id} is no path, and {why}, or name a downloaded folder") from None


# --- this project's folder -----------------------------------------------------------------------------------------


def save(model: LatentDiffusion, path: str | os.PathLike, dtype: torch.dtype | None = torch.float16) -> None:
    """Write the model's folder: weights in `dtype` (None: as they are), the config last."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        save_part(part_of(model, part), path, part, dtype)
    write_config(model.config, path)


def part_of(model: LatentDiffusion, part: str) -> nn.Module:
    """The module stored under a part's name. A model without an image tower stores its text towers alone."""
    if part == "clip":
        return model.clip or nn.ModuleDict(model.towers.items())
    return getattr(model, part)


def save_part(module: nn.Module, path: Path, part: str, dtype: torch.dtype | None = torch.float16) -> None:
    """Write one part's safetensors file."""
    state = {
        name: (t.to(dtype) if dtype and t.is_floating_point() else t).contiguous().cpu()
        for name, t in module.state_dict().items()
    }
    with whole_file(path / f"{part}.safetensors") as file:
        save_file(state, file)


def export_part(model: LatentDiffusion, module: nn.Module, path: Path, part: str) -> None:
    """Write one part of a folder whose parts are trained one by one: `module`'s weights in half precision, and those
    sections of the model's config that describe it. What the config says of the other parts stays."""
    save_part(module, path, part)
    stored = read_config(path) if (path / "config.json").exists() else {}
    own = {section: model.config[section] for section in SECTIONS_OF[part] if section in model.config}
    write_config({**model.config, **stored, **own}, path)


def write_config(config: Mapping, path: Path) -> None:
    with whole_file(path / "config.json") as file:
        file.write_text(json.dumps(dict(config), indent=1) + "\n")


def read_config(path: Path, file: str = "config.json") -> dict:
    """The sizes in a folder's `config.json`, or in another file of JSON. Raises InputError where it cannot be read."""
    try:
        return json.loads((path / file).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path / file} cannot be read: {error}") from None


def read_part(path: Path, part: str) -> dict[str, Tensor]:
    """The weights of one part of a folder of this project."""
    file = path / f"{part}.safetensors"
    if not file.exists():
        raise InputError(f"{path} lacks {file.name}: train it with `python train.py part={part}`")
    return read_tensors(file)
