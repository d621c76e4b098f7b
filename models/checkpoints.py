"""Loading and saving models: this project's own folder, and published checkpoints as files, hub folders and hub ids.

A folder of this project holds `config.json` (all sizes, readable) and one safetensors file for each part that is
trained on its own: `autoencoder`, `clip` (text and image towers) and `unet`. A checkpoint is read in one pass: each key
is renamed once (models/names.py), and each tensor is cast once, into a network that was built on the meta device."""

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
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from errors import InputError
from files import whole_file
from models import names
from models.autoencoder import Autoencoder
from models.latent_diffusion import LatentDiffusion, build
from models.t5 import T5, read_tokenizer

PARTS = ("autoencoder", "clip", "unet")
SECTIONS = [ours for ours, _ in names.HUB_SIZES.values()] + ["vision", "prediction", "image_size", "empty_is_zero"]
SECTIONS_OF = {"autoencoder": ["vae"], "clip": ["text", "vision"], "unet": ["unet", "schedule", "prediction"]}
SPIECE = "tokenizer_3/spiece.model"  # T5's tokenizer in a hub folder
ENDINGS = ("model.safetensors", "model.bin", "model.fp16.safetensors", "model.fp16.bin")  # of weights, best first
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")  # org/name, org/name@revision

Opened = tuple[dict[str, Any], dict[str, Tensor]]  # a model's sizes, and its weights by our names


def load(
    path: str | os.PathLike,
    arch: Mapping | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    ema: bool | None = None,
    vae: str | os.PathLike | None = None,
    text: str | os.PathLike | Sequence[str | os.PathLike] = (),
    tokenizer: str | os.PathLike | None = None,
) -> LatentDiffusion:
    """The model at `path`: a folder written by `save`, or a Stable Diffusion 1.x, 2.x, XL or 3 as a single file
    (.safetensors, .ckpt), as a folder in the model hub's layout, or as a hub id ("org/name", "org/name@revision"),
    which is fetched once.

    `arch` gives sizes that differ from the family's, in the form of config.json. `ema` chooses between the UNet's
    averaged weights (True) and the plain ones (False) where a single file has both; None takes the averaged if there
    are some. `vae` names another autoencoder: a file, or a folder of the hub's layout. A CLIP with an image tower stays
    in float32, so that its scores do not depend on a half-precision `dtype`; an autoencoder is never in float16, in
    which SDXL's overflows. On a CPU, weights that need no cast stay mapped to their file.

    `text` names files, or hub folders, with the text encoders that a single file of a Stable Diffusion 3 lacks, and
    `tokenizer` T5's sentencepiece model, where no hub folder brings it. Without T5 it works on zeros, with a warning.

    Raises InputError for a path that is missing, incomplete, damaged, of another kind or at odds with `arch`."""
    source = located(path, half=dtype.itemsize == 2)
    texts = [Path(place) for place in ([text] if isinstance(text, str | os.PathLike) else text)]
    try:
        if source.is_file():
            config, named = open_single_file(source, arch, ema, texts)
        elif texts:
            raise InputError("model.text is for a Stable Diffusion 3 in a single file")
        elif (source / "config.json").exists():
            config = configured({}, read_config(source), arch)
            named = {f"{part}.{key}": tensor for part in PARTS for key, tensor in read_part(source, part).items()}
        else:
            config, named = open_hub_folder(source, arch)
        if vae is not None:
            config, others = open_autoencoder(Path(vae), config)
            named = {name: t for name, t in named.items() if not name.startswith("autoencoder.")} | others
        names.check(named)
        model = build(config, vocabulary=named.get("clip.text.vocabulary"), meta=True)
        parts = nn.ModuleDict({part: part_of(model, part) for part in PARTS})
        safe = {Autoencoder: torch.float32, T5: torch.bfloat16} if dtype == torch.float16 else {}  # they overflow in it
        for module in (model.unet, model.autoencoder, *model.towers.values()):  # on the meta device
            module.to(safe.get(type(module), dtype))
        if model.clip is not None:
            model.clip.to(torch.promote_types(dtype, torch.float32))
        parts.load_state_dict(fitted(parts.state_dict(), unscaled(named, dtype), device), assign=True)
    except InputError as error:
        raise error if str(source) in str(error) else InputError(f"{source}: {error}") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # of a hub's config
        raise InputError(f"{source}: its sizes or model.arch describe no network ({error!r})") from error
    parts.to(device)  # the buffers that no file brings
    if "t5" in config:
        for file in [Path(tokenizer)] if tokenizer else [folder / SPIECE for folder in (source, *texts)]:
            if tokenizer or file.exists():
                model.towers["t5"].tokenizer = read_tokenizer(file)
    elif tokenizer:
        raise InputError(f"{source}: model.tokenizer is for T5, which it lacks")
    elif "mmdit" in config:
        warnings.warn("T5 is not there, and zeros stand for its states: model.text=PATH adds it", stacklevel=2)
    return model.eval().requires_grad_(False)


def located(path: str | os.PathLike, half: bool) -> Path:
    """Where the model is: a hub id is fetched, and a sub-folder of a hub folder, or a file in it, names the whole."""
    source = Path(path)
    if not source.exists():
        if not HUB_ID.fullmatch(str(path)) or source.suffix in (".safetensors", ".ckpt"):
            raise InputError(f"there is no checkpoint at {path}")
        return fetch(str(path), half)
    folder = (source if source.is_dir() else source.parent).resolve()
    within = folder.name in names.FOLDERS and (folder / "config.json").exists() and (folder.parent / "vae").is_dir()
    return folder.parent if within else source


def open_single_file(path: Path, arch: Mapping | None, ema: bool | None, texts: Sequence[Path] = ()) -> Opened:
    """A Stable Diffusion in one file, of whose text encoders some may be in the files or hub folders `texts`. Keys
    outside its networks are left out, with a warning where they are unknown."""
    tensors, named, foreign = read_tensors(path), {}, set()
    metadata = safe_open(path, "pt").metadata() if path.suffix == ".safetensors" else None
    family = names.family(tensors)
    config = configured(family, names.stated(tensors, metadata or {}) if "unet" in family else {}, arch)
    averaged = any(key.startswith("model_ema.diffusion_model") for key in tensors) if ema is None else ema
    for key in tensors:
        name, stored = names.renamed(key, config), key
        if name is None:
            foreign |= set() if re.search(names.NO_WEIGHTS, key) else {key.split(".")[0]}
            continue
        if averaged and name.startswith("unet."):
            stored = "model_ema." + key.removeprefix("model.").replace(".", "")  # as the averages were registered
            if stored not in tensors:
                raise InputError(f"{stored} is missing: ema=false takes the plain weights")
        named[name] = tensors[stored]
    if foreign:
        warnings.warn(f"{path}: keys outside its networks are left out: {', '.join(sorted(foreign))}", stacklevel=2)
    for file in texts:
        named |= read_text_encoders(file, config["text"]["width"])
    if "mmdit" in config and not any(name.startswith("clip.text.") for name in named):
        raise InputError("it has no text encoders: give model.text=PATH, files or a folder of the hub's layout")
    if any(name.startswith("clip.t5.") for name in named):
        config.setdefault("t5", {})
    return config, named


def open_hub_folder(path: Path, arch: Mapping | None) -> Opened:
    """A Stable Diffusion in a folder of the hub's layout."""
    tensors = read_folder(path)
    folders = {key.split("/")[0] for key in tensors}
    family = names.FAMILIES["conditioner.embedders.1."] if "text_encoder_2" in folders else {}
    config = configured(names.SD3 if "transformer" in folders else family, hub_sizes(path, folders), arch)
    named = {names.renamed(key, config): tensor for key, tensor in tensors.items()}
    named.pop(None, None)  # of keys that are no weights
    for name in [name for name in named if names.swapped(name, config)]:
        named[name] = torch.cat(named[name].chunk(2)[::-1])
    return config, named


def open_autoencoder(path: Path, config: Mapping) -> Opened:
    """The config with the autoencoder at `path`, and its weights: a file in either layout, or a hub folder. A file
    states no sizes: they, and the latents' scale, stay the model's."""
    folder = path / "vae" if (path / "vae").is_dir() else path
    if folder.is_dir():
        config = {**config, "vae": {**config["vae"], **taken("vae", read_config(folder))}}
        tensors = read_folder(folder.parent, [folder.name])
    elif path.exists():
        tensors = read_tensors(path)
    else:
        raise InputError(f"there is no autoencoder at {path}")
    keys = {re.sub(r"^first_stage_model\.|^.*/", "", key): key for key in tensors}
    keys = {short: key for short, key in keys.items() if re.match(r"(en|de)coder\.|(post_)?quant_conv\.", short)}
    return config, {names.renamed(f"vae/{short}", config): tensors[key] for short, key in keys.items()}


def read_folder(path: Path, folders: Iterable[str] = names.FOLDERS) -> dict[str, Tensor]:
    """The weights in the sub-folders of a hub folder, as "FOLDER/KEY"."""
    files = weight_files([f"{file.parent.name}/{file.name}" for file in path.glob("*/*")], folders)
    several = [(folder, read_tensors(path / file)) for folder, parts in files.items() for file in parts]
    return {f"{folder}/{key}": tensor for folder, tensors in several for key, tensor in tensors.items()}


def read_text_encoders(path: Path, width: int) -> dict[str, Tensor]:
    """The text encoders of an SD3 in a file or a hub folder, by our names. A CLIP without a prefix is the first if it
    has the `width`. Raises InputError where there is none."""
    if path.is_dir():
        tensors = read_folder(path, names.FOLDERS[3:])
    else:
        tensors = read_tensors(path) if path.exists() else {}
        norm = tensors.get("text_model.final_layer_norm.weight")
        clip = "" if norm is None else "text_encoder/" if len(norm) == width else "text_encoder_2/"
        prefix = "text_encoder_3/" if "shared.weight" in tensors else clip
        tensors = {prefix + key: tensor for key, tensor in tensors.items()}
    named = {names.renamed(key, {}): tensor for key, tensor in tensors.items()}
    if not (found := {name: tensor for name, tensor in named.items() if name and name.startswith("clip.")}):
        raise InputError(f"model.text: there is no text encoder of a Stable Diffusion 3 at {path}")
    return found


def unscaled(named: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors as they are, but those of float8 that have a scale beside them, times the scale in `dtype`."""
    out = {}
    for name, tensor in named.items():
        stem, _, kind = name.rpartition(".")
        if kind in ("scale_weight", "weight_scale", "scale_input", "input_scale", "scaled_fp8"):
            continue
        scale = named.get(f"{stem}.scale_weight", named.get(f"{stem}.weight_scale")) if kind == "weight" else None
        if scale is not None and scale.numel():
            if scale.numel() not in (1, *tensor.shape[:1]):
                raise InputError(f"{name} of {len(tensor)} rows has {scale.numel()} scales")
            scale = scale.float().reshape(-1, *[1] * (tensor.ndim - 1))  # one number, or one for each row
            tensor = (tensor.float() * scale).to(dtype)
        out[name] = tensor
    return out


def fitted(own: Mapping[str, Tensor], named: Mapping[str, Tensor], device: Any) -> dict[str, Tensor]:
    """A state dict of `own`'s names, shapes and precisions from the `named` tensors, those that belong together
    stacked. Each is cast alone, so that beside the result only pages of mapped files lie in memory, which the system
    can drop. Raises InputError with the first three that are missing, unexpected, of another shape, or not finite."""
    state, problems, left = {}, [], dict(named)
    for name, wanted in own.items():
        members = [name] if name in left else names.members(name)
        pieces = [left.pop(member) for member in members if member in left]
        if len(pieces) < len(members):
            problems.append(f"{name} is missing")
            continue
        if members == [f"{name}.weight"]:
            pieces = [pieces[0].mT]  # a Linear's weight where open_clip multiplies from the right
        if pieces[0].ndim == 4 and wanted.ndim == 2:
            pieces = [piece.flatten(1) for piece in pieces]  # a 1x1 convolution on pixels is a Linear
        shape = [*pieces[0].shape]
        shape[:1] = [sum(piece.shape[0] for piece in pieces)] if shape else []
        if shape != [*wanted.shape]:
            problems.append(f"{name} is {shape} where {[*wanted.shape]} fits")
        state[name] = pieces
    # CLIP's projection and its last layer, which some families do not use, may be there.
    problems += [f"{name} is unexpected" for name in left if not re.search(r"\.text_projection|\.resblocks\.", name)]
    for name, pieces in {} if problems else state.items():
        moved = [piece.to(device, own[name].dtype) for piece in pieces]
        state[name] = whole = torch.cat(moved) if len(moved) > 1 else moved[0]
        if whole.is_floating_point() and not torch.stack(whole.aminmax()).isfinite().all():
            problems.append(f"{name} is NaN or infinite")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InputError(f"it does not fit the networks: {'; '.join(problems[:3])}{more}")
    return state


def configured(family: Mapping, stated: Mapping, arch: Mapping | None) -> dict[str, Any]:
    """The sizes of a family, then those that the checkpoint states, then the user's `arch`, where null says nothing.
    Raises InputError for an unknown section, for a prediction that the checkpoint contradicts, and for none."""
    given, said, config = arch or {}, stated.get("prediction"), {"schedule": {}}
    if said and given.get("prediction") not in (None, said):
        raise InputError(f"arch.prediction is {given['prediction']}, and the checkpoint says {said}")
    for section, values in chain(family.items(), stated.items(), given.items()):
        if section not in SECTIONS:
            raise InputError(f"arch.{section} is unknown: choose from {', '.join(SECTIONS)}")
        if values is not None:
            config[section] = {**config.get(section, {}), **values} if isinstance(values, Mapping) else values
    if "prediction" not in config:
        raise InputError("nothing says what it predicts: give arch.prediction, epsilon (512 pixels) or v (768 pixels)")
    return {"image_size": 768 if config["prediction"] == "v" else 512} | config


def hub_sizes(path: Path, folders: Iterable[str]) -> dict[str, Any]:
    """The sizes that the config files of a hub folder with these sub-folders state, and its learned tokens."""
    files = {folder: read_config(path / folder) for folder in folders}
    scheduler = files["scheduler"] = read_config(path / "scheduler", "scheduler_config.json")
    stated: dict[str, Any] = {names.HUB_SIZES[folder][0]: taken(folder, files[folder]) for folder in files}
    for section, folder in (("text", "text_encoder"), ("text_2", "text_encoder_2")):
        if folder in files:
            quick = files[folder].get("hidden_act", "quick_gelu") == "quick_gelu"  # OpenAI's
            stated[section] |= {"quick_gelu": quick, "pad_token": "end" if quick else 0}
            tokens = path / folder.replace("text_encoder", "tokenizer")
            added = read_config(tokens, "added_tokens.json") if (tokens / "added_tokens.json").exists() else {}
            stated[section]["added_tokens"] = {token: n for token, n in added.items() if not token.startswith("<|")}
    network = files.get("transformer") or files["unet"]
    if side := network.get("sample_size"):  # of the latent
        stated["image_size"] = side * 2 ** (len(stated["vae"]["ch_mult"]) - 1)
    if "mmdit" in stated:
        stated["mmdit"]["qk_norm"], stated["schedule"]["kind"] = "qk_norm" in stated["mmdit"], "flow"
        return stated | {"prediction": "flow"}
    prediction = {"epsilon": "epsilon", "v_prediction": "v"}.get(scheduler.get("prediction_type", "epsilon"))
    if prediction is None:
        raise InputError("its scheduler is not supported: epsilon or v_prediction")
    stated["unet"] |= {
        "attention_levels": [i for i, kind in enumerate(network["down_block_types"]) if "CrossAttn" in kind],
        # "attention_head_dim" is, against its name, the number of heads, in all levels or in each.
        "num_heads": network.get("num_attention_heads") or network["attention_head_dim"],
    }
    if (path / "model_index.json").exists() and "text_2" in stated:
        stated["empty_is_zero"] = read_config(path, "model_index.json").get("force_zeros_for_empty_prompt", True)
    return stated | {"prediction": prediction}


def taken(folder: str, content: Mapping) -> dict[str, Any]:
    """Our sizes among those of a config file in the hub's sub-folder."""
    table, widths = names.HUB_SIZES[folder][1].items(), content.get("block_out_channels")
    found = {ours: content[theirs] for theirs, ours in table if content.get(theirs) is not None}
    if widths:
        first, multiples = ("ch", "ch_mult") if folder == "vae" else ("model_channels", "channel_mult")
        found |= {first: widths[0], multiples: [width // widths[0] for width in widths]}
    return found


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


def weight_files(files: Sequence[str], folders: Iterable[str] = names.FOLDERS, half=False) -> dict[str, list[str]]:
    """The weights of each of the `folders` among the `files` ("unet/...") of a hub folder, by the order of `ENDINGS`,
    but half precision first where it is enough; perhaps in several files. Raises InputError where there is none."""
    chosen, whole = {}, {file: re.sub(r"-\d{5}-of-\d{5}", "", file) for file in files}
    endings = sorted(ENDINGS, key=lambda end: (".fp16" in end) != half)
    for part in folders:
        found = [file for end in endings for file in files if file.startswith(f"{part}/") and whole[file].endswith(end)]
        if found:
            chosen[part] = sorted(file for file in found if whole[file] == whole[found[0]])
        elif part == "text_encoder" and any(file.startswith("text_encoder_2/") for file in files):
            raise InputError(f"it is {names.REFINER}")
        elif part not in names.NOT_IN_ALL and not (part == "unet" and "transformer" in chosen):
            raise InputError(f"there are no weights in {part}/, and no config.json of this project")
    return chosen


def fetch(repo_id: str, half: bool = False) -> Path:
    """The folder of "org/name" in huggingface_hub's cache, with the files that a model needs, in half precision if that
    is there and enough; "org/name@revision" is a branch, a tag or a commit. A whole copy serves as it is; else they are
    downloaded. Raises InputError where that fails."""
    from huggingface_hub import list_repo_files, snapshot_download

    name, _, revision = repo_id.partition("@")
    at = {"revision": revision or None}
    with suppress(OSError, InputError):  # it is not cached, or not whole
        folder = Path(snapshot_download(name, local_files_only=True, **at))
        weight_files([f"{file.parent.name}/{file.name}" for file in folder.glob("*/*")])
        return folder
    try:
        files = weight_files(list_repo_files(name, **at), half=half).values()
        return Path(snapshot_download(name, allow_patterns=["*.json", SPIECE, *chain(*files)], **at))
    except InputError as error:
        raise InputError(f"{repo_id}: {error}") from None
    except Exception as error:  # the hub's own, and those of three libraries below it
        why = f"the hub does not give it ({type(error).__name__}): log in with `hf auth login` if it is closed"
        raise InputError(f"{repo_id} is no path, and {why}, or name a downloaded folder") from None


def save(model: LatentDiffusion, path: str | os.PathLike, dtype: torch.dtype | None = torch.float16) -> None:
    """Write the model's folder: weights in `dtype` (None: as they are), the config last."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        save_part(part_of(model, part), path, part, dtype)
    with whole_file(path / "config.json") as file:
        file.write_text(json.dumps(model.config, indent=1) + "\n")


def part_of(model: LatentDiffusion, part: str) -> nn.Module:
    """The module stored under a part's name. A model without an image tower stores its text towers alone."""
    if part == "clip":
        return model.clip or nn.ModuleDict(model.towers.items())
    return getattr(model, part)


def save_part(module: nn.Module, path: Path, part: str, dtype: torch.dtype | None = torch.float16) -> None:
    """Write one part's safetensors file."""
    cast = lambda t: (t.to(dtype) if dtype and t.is_floating_point() else t).contiguous().cpu()
    with whole_file(path / f"{part}.safetensors") as file:
        save_file({name: cast(tensor) for name, tensor in module.state_dict().items()}, file)


def export_part(model: LatentDiffusion, module: nn.Module, path: Path, part: str) -> None:
    """Write one part of a folder whose parts are trained one by one: `module`'s weights in half precision, and those
    sections of the model's config that describe it. What the config says of the other parts stays."""
    save_part(module, path, part)
    stored = read_config(path) if (path / "config.json").exists() else {}
    own = {section: model.config[section] for section in SECTIONS_OF[part] if section in model.config}
    with whole_file(path / "config.json") as file:
        file.write_text(json.dumps({**model.config, **stored, **own}, indent=1) + "\n")


def read_config(path: Path, file: str = "config.json") -> dict:
    """The sizes in a folder's `config.json`, or in another file of JSON. Raises InputError where it cannot be read."""
    try:
        return {**json.loads((path / file).read_text())}
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path / file} cannot be read: {error}") from None


def read_part(path: Path, part: str) -> dict[str, Tensor]:
    """The weights of one part of a folder of this project."""
    file = path / f"{part}.safetensors"
    if not file.exists():
        raise InputError(f"{path} lacks {file.name}: train it with `python train.py part={part}`")
    return read_tensors(file)
