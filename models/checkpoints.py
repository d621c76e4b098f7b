"""Loading and saving models: this project's own folder, and published checkpoints as files, hub folders and hub ids.

A folder of this project holds `config.json` (all sizes, readable) and one safetensors file for each part that is
trained on its own: `autoencoder`, `clip` (text and image towers) and `unet`. A checkpoint is read in one pass: each key
is renamed once (models/names.py), and each tensor is cast once, into a network that was built on the meta device.
"""

from __future__ import annotations

import json
import mmap
import os
import pickle
import re
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from errors import InputError
from files import whole_file
from models import names
from models.latent_diffusion import LatentDiffusion, build

PARTS = ("autoencoder", "clip", "unet")
SECTIONS = ("unet", "vae", "text", "vision", "schedule", "prediction", "image_size")  # of a config
SECTIONS_OF = {"autoencoder": ["vae"], "clip": ["text", "vision"], "unet": ["unet", "schedule", "prediction"]}
PREDICTIONS = {"v": "v", "v_prediction": "v", "epsilon": "epsilon", "eps": "epsilon"}
HEADS = {"num_heads", "num_head_channels"}

Opened = tuple[LatentDiffusion, Iterator[tuple[str, Tensor]]]  # a model without weights, and those by our names


def load(
    path: str | os.PathLike,
    arch: Mapping | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    ema: bool | None = None,
) -> LatentDiffusion:
    """The model at `path`: a folder written by `save`, or a Stable Diffusion 1.x or 2.x as a single file (.safetensors,
    .ckpt), as a folder in the model hub's layout, or as a hub id ("org/name"), which is fetched once.

    `arch` gives sizes that differ from the family's, in the form of config.json. `ema` chooses between the UNet's
    averaged weights (True) and the plain ones (False) where a checkpoint has both; None takes the averaged if there are
    some. A CLIP with an image tower stays in float32, so that its scores do not depend on a half-precision `dtype`.

    Raises InputError for a path that is missing, incomplete, damaged, of another kind or at odds with `arch`.
    """
    source, half = Path(path), dtype == torch.float16
    if not source.exists():
        if not HUB_ID.fullmatch(str(path)) or source.suffix in (".safetensors", ".ckpt", ".bin", ".pt"):
            raise InputError(f"there is no checkpoint at {path}")
        source = fetch(str(path), half, ema)
    try:
        if source.is_file():
            model, named = open_single_file(source, arch, ema)
        elif (source / "config.json").exists():
            model, named = open_own_folder(source, arch)
        else:
            model, named = open_hub_folder(source, arch, half, ema)
        parts = nn.ModuleDict({part: part_of(model, part) for part in PARTS})
        clip_dtype = torch.promote_types(dtype, torch.float32) if model.clip else dtype

        def convert(name: str, tensor: Tensor) -> Tensor:
            kind = clip_dtype if name.startswith("clip.") else dtype
            return tensor.to(device, kind if tensor.is_floating_point() else None, copy=True)

        parts.load_state_dict(fitted(parts.state_dict(), named, convert), assign=True)
    except InputError as error:
        raise error if str(source) in str(error) else InputError(f"{source}: {error}") from None
    return model.to(device).eval().requires_grad_(False)


def open_own_folder(path: Path, arch: Mapping | None) -> Opened:
    """A folder of this project."""
    tensors = {part: read_part(path, part) for part in PARTS}
    model = build_from(configured({}, read_config(path), arch), tensors["clip"].get("text.vocabulary"))
    return model, ((f"{part}.{key}", file.pop(key)) for part, file in tensors.items() for key in list(file))


def open_single_file(path: Path, arch: Mapping | None, ema: bool | None) -> Opened:
    """A Stable Diffusion in one file."""
    tensors, notes = read_tensors(path), read_notes(path)
    stated = notes.get("modelspec.predict_key") or notes.get("modelspec.prediction_type")
    if "v_pred" in tensors:  # an empty tensor, with which some programs mark models that predict v
        stated = "v"
    prediction = {"prediction": PREDICTIONS[stated]} if stated in PREDICTIONS else {}
    model = build_from(configured(names.family(tensors), prediction, arch))
    stored = tensors.get("alphas_cumprod")
    if stored is not None and stored.is_floating_point():
        alpha_bars, rounding = model.schedule.alpha_bars, torch.finfo(stored.dtype).eps
        if stored.shape != alpha_bars.shape or not (stored.double() - alpha_bars).abs().max() < 1e-4 + rounding:
            raise InputError("it was trained with another noise schedule (its alphas_cumprod): give arch.schedule")
    averaged = any(key.startswith("model_ema.diffusion_model") for key in tensors)
    if ema and not averaged:
        raise InputError("ema=true, and the file holds no averaged weights (model_ema.*): leave ema out")

    def named() -> Iterator[tuple[str, Tensor]]:
        tower = model.text.tower
        for key in list(tensors):
            name, stored = names.from_single_file(key), key
            layer = re.match(r"clip\.text\.tower\.transformer\.resblocks\.(\d+)\.", name or "")
            if name is None or (layer and int(layer[1]) >= len(tower.transformer.resblocks)):
                continue
            if averaged and ema is not False and name.startswith("unet."):
                stored = "model_ema." + key.removeprefix("model.").replace(".", "")  # as the averages were registered
                if stored not in tensors:
                    raise InputError(f"{stored} is missing: ema=false takes the plain weights")
            tensor = tensors.pop(stored)
            if name.endswith("token_embedding.weight"):
                tensor = tensor[: tower.vocab_size]  # textual inversion adds rows
            yield name, tensor

    return model, named()


def open_hub_folder(path: Path, arch: Mapping | None, half: bool, ema: bool | None) -> Opened:
    """A Stable Diffusion in a folder of the hub's layout."""
    files, (defaults, stated) = hub_files(path, half, ema), hub_sizes(path)
    model = build_from(configured(defaults, stated, arch))

    def named() -> Iterator[tuple[str, Tensor]]:
        for folder, shards in files.items():
            tensors = dict(ChainMap(*map(read_tensors, shards)))
            for key in list(tensors):
                if (name := names.from_hub(folder, key, stated)) is not None:
                    yield name, tensors.pop(key)

    return model, named()


def fitted(
    own: Mapping[str, Tensor], named: Iterable[tuple[str, Tensor]], convert: Callable = lambda name, tensor: tensor
) -> dict[str, Tensor]:
    """A state dict of `own`'s names and shapes: the `named` tensors after `convert`, those that belong together
    stacked. Raises InputError with the first three that are missing, unexpected or of another shape or kind."""
    state, stacks, problems = {}, {}, []
    for name, tensor in named:
        name, place, count = names.stacked(name)
        wanted = own.get(name)
        if wanted is None:
            problems.append(f"{name} is unexpected")
            continue
        if tensor.ndim == 4 and wanted.ndim == 2 and tensor.shape[2:] == (1, 1):
            tensor = tensor.flatten(1)  # a 1x1 convolution on pixels is a Linear
        fits = tensor.is_floating_point() == wanted.is_floating_point() and tensor.ndim == wanted.ndim
        if not fits or (tensor.shape[1:] != wanted.shape[1:]) or (wanted.ndim and len(tensor) * count != len(wanted)):
            problems.append(f"{name} is {tensor.dtype} {[*tensor.shape]} where {wanted.dtype} {[*wanted.shape]} fits")
            continue
        pieces = stacks.setdefault(name, {})
        pieces[place] = convert(name, tensor)
        if len(pieces) == count:
            state[name] = torch.cat([pieces[i] for i in range(count)]) if count > 1 else pieces[0]
            del stacks[name]
    problems += [f"{name} is missing" for name in own if name not in state]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InputError(f"it does not fit the networks: {'; '.join(problems[:3])}{more}")
    return state


# --- sizes ---------------------------------------------------------------------------------------------------------


def configured(defaults: Mapping, stated: Mapping, arch: Mapping | None) -> dict[str, Any]:
    """The sizes of a family, then those that the checkpoint states, then the user's `arch`.

    Raises InputError where `arch` has an unknown section or contradicts the checkpoint (but for `image_size`), and
    where nothing says the prediction.
    """
    arch, config = dict(arch or {}), {"schedule": {}}
    if unknown := [section for section in arch if section not in SECTIONS]:
        raise InputError(f"arch.{unknown[0]} is unknown: choose from {', '.join(SECTIONS)}")
    known = flat(stated)
    for name, value in flat(arch).items():
        if name != "image_size" and known.get(name, value) != value:
            raise InputError(f"arch.{name} is {value}, and the checkpoint says {known[name]}")
    for given in (defaults, stated, arch):
        for section, values in given.items():
            if isinstance(values, Mapping):
                dropped = HEADS if HEADS & set(values) else ()  # one of the two replaces the other
                values = {k: v for k, v in config.get(section, {}).items() if k not in dropped} | dict(values)
            config[section] = values
    if "prediction" not in config:
        raise InputError("nothing says what it predicts: give arch.prediction, epsilon (512 pixels) or v (768 pixels)")
    return {"image_size": 768 if config["prediction"] == "v" else 512} | config


def flat(config: Mapping) -> dict[str, Any]:
    """{"unet": {"num_heads": 8}} -> {"unet.num_heads": 8}."""
    sections = {s: v if isinstance(v, Mapping) else {"": v} for s, v in config.items()}
    return {f"{s}.{k}".rstrip("."): v for s, values in sections.items() for k, v in values.items()}


def build_from(config: Mapping, vocabulary: Tensor | None = None) -> LatentDiffusion:
    """`build` without weights, of a user's sizes. Raises InputError for sizes that are missing or impossible."""
    try:
        return build(config, vocabulary=vocabulary, meta=True)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AssertionError) as error:  # torch asserts the sizes of its layers
        raise InputError(f"its sizes describe no network: {error}") from None


def hub_sizes(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(defaults, stated): the sizes that the config files of a hub folder leave open, and those that they state."""
    configs = {folder: read_json(path / folder / "config.json") for folder in names.HUB}
    unet, vae, text = configs["unet"], configs["vae"], configs["text_encoder"]
    stated: dict[str, Any] = {
        section: {ours: configs[folder][theirs] for theirs, ours in table.items() if theirs in configs[folder]}
        for folder, (section, table) in names.HUB_SIZES.items()
    }
    try:
        widths, ch = unet["block_out_channels"], vae["block_out_channels"]
        stated["unet"] |= {"model_channels": widths[0], "channel_mult": [width // widths[0] for width in widths]}
        stated["unet"]["attention_levels"] = [i for i, t in enumerate(unet["down_block_types"]) if "CrossAttn" in t]
        # "attention_head_dim" is, against its name, the number of heads, in all levels or in each.
        heads = unet.get("num_attention_heads") or unet.get("attention_head_dim") or 8
        per_head = {w // n for w, n in zip(widths, heads, strict=True)} if isinstance(heads, list) else ()
        stated["unet"] |= {"num_head_channels": per_head.pop()} if len(per_head) == 1 else {"num_heads": heads}
        stated["vae"] |= {"ch": ch[0], "ch_mult": [width // ch[0] for width in ch]}
        if isinstance(side := unet.get("sample_size"), int):
            stated["image_size"] = side * 2 ** (len(ch) - 1)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{path}: its config files describe no Stable Diffusion ({error!r})") from None
    first = text.get("hidden_act", "quick_gelu") == "quick_gelu"  # 1.x
    tokens = path / "tokenizer" / "special_tokens_map.json"
    pad = read_json(tokens).get("pad_token") if tokens.exists() else None
    pad = pad.get("content") if isinstance(pad, dict) else pad
    end = first if pad is None else pad != "!"
    stated["text"] |= {"quick_gelu": first, "pad_token": "end" if end else 0}
    scheduler = path / "scheduler" / "scheduler_config.json"
    if not scheduler.exists():
        return ({"prediction": "epsilon"} if first else {}), stated
    config = read_json(scheduler)
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS or config.get("rescale_betas_zero_snr") or config.get("trained_betas"):
        raise InputError(f"{scheduler} is not supported: epsilon or v_prediction, with betas that are not rescaled")
    stated["prediction"] = PREDICTIONS[prediction]
    stated["schedule"] = {
        "kind": config.get("beta_schedule", "linear"),
        "beta_start": config.get("beta_start", 0.0001),
        "beta_end": config.get("beta_end", 0.02),
        "timesteps": config.get("num_train_timesteps", 1000),
    }
    return {}, stated


# --- files ---------------------------------------------------------------------------------------------------------

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool, "U8": torch.uint8},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
}
UNREADABLE = (
    *(RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError, AssertionError),
    SafetensorError,  # from torch.load, which goes by the file's name
)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors or a PyTorch file (.ckpt, .bin) on the CPU; nothing in it is executed. They stay
    mapped: a page is read when it is used. Raises InputError for a file that is damaged or of another kind."""
    try:
        with open(file, "rb") as stream:
            start = stream.read(9)
            if start[8:] == b"{":
                data, header = read_header(stream)
                return {k: mapped(stream.fileno(), data, entry) for k, entry in header.items() if k != "__metadata__"}
        zipped = start[:2] == b"PK"
        if not zipped and start[:1] != b"\x80":
            raise InputError(f"{file} is damaged or no weights: those are .safetensors and .ckpt files")
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from None
    except pickle.UnpicklingError:
        raise InputError(f"{file} is a pickle that could run code: take the .safetensors file instead") from None
    except UNREADABLE:
        raise InputError(f"{file} is damaged or cut short: download it again") from None
    content = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    return {name: t for name, t in content.items() if isinstance(name, str) and isinstance(t, Tensor)}


def read_header(stream) -> tuple[int, dict[str, dict]]:
    """Where the data of a safetensors file begin, and its header: {name: {dtype, shape, data_offsets}}. Raises a
    ValueError for a file that is shorter than its header says."""
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    header = json.loads(stream.read(min(length, 10**8)))
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    if os.fstat(stream.fileno()).st_size < 8 + length + end:
        raise ValueError("cut short")
    return 8 + length, header


def mapped(descriptor: int, data: int, entry: Mapping) -> Tensor:
    """One tensor of a safetensors file, in a mapping of its own, so that its pages go when the tensor goes."""
    first, end = (data + offset for offset in entry["data_offsets"])
    if first == end:
        return torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
    page = first - first % mmap.ALLOCATIONGRANULARITY
    pages = mmap.mmap(descriptor, end - page, access=mmap.ACCESS_COPY, offset=page)
    numbers = torch.frombuffer(pages, dtype=torch.uint8, offset=first - page)
    return numbers.view(DTYPES[entry["dtype"]]).view(entry["shape"])


def read_notes(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file; {} for another file."""
    with open(file, "rb") as stream:
        return read_header(stream)[1].get("__metadata__", {}) if stream.read(9)[8:] == b"{" else {}


def read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text())
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no settings by name")
    return content


# --- the model hub -------------------------------------------------------------------------------------------------

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")  # org/name, org/name@revision
WEIGHTS = re.compile(  # older releases have the variant after the shard's number
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(fp16|non_ema))?(?:-\d+-of-(\d+))?(?:\.(fp16))?\.(safetensors|bin)"
)


def hub_files(path: Path, half: bool = False, ema: bool | None = None) -> dict[str, list[Path]]:
    """The weight files of each sub-folder of the hub's layout: one complete set, of one file or of shards in order.

    Safetensors are chosen before pickles, half precision only with `half` or where there is nothing else, and for
    `ema=False` the weights before the moving average. Raises InputError where no set is complete.
    """
    if (path / "text_encoder_2").is_dir() or (path / "transformer").is_dir():
        raise InputError(f"{path} seems to be an SDXL or SD3, which is not supported: Stable Diffusion 1.x and 2.x are")

    def rank(variant: str, shards: int, kind: str) -> tuple[bool, ...]:
        return (variant == "non_ema") != (ema is False), (variant == "fp16") != half, kind == "bin"

    chosen = {}
    for folder in names.HUB:
        found: dict[tuple[str, int, str], list[Path]] = {}  # (variant, number of shards or 0, kind) -> files
        for file in sorted((path / folder).glob("*")):
            if (match := WEIGHTS.fullmatch(file.name)) and file.exists():
                key = match[1] or match[3] or "", int(match[2] or 0), match[4]
                found.setdefault(key, []).append(file)
        complete = [key for key, files in found.items() if key[1] in (0, len(files))]
        if not complete:
            raise InputError(f"{path} has no complete weights in {folder}/, and no config.json of this project")
        best = min(complete, key=lambda key: rank(*key))
        chosen[folder] = found[best] if best[1] else found[best][:1]
    return chosen


def fetch(repo_id: str, half: bool = False, ema: bool | None = None) -> Path:
    """The folder of "org/name" or "org/name@revision" in huggingface_hub's cache, with the files that a model needs. A
    cached copy serves as it is; the others are downloaded. Raises InputError where that fails."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    name, _, revision = repo_id.partition("@")
    ends = ("model.fp16.safetensors" if half else "model.safetensors", "model*.safetensors", "model*.bin")
    attempts = [{"allow_patterns": ["*.json", *(f"{part}/*{end}" for part in names.HUB)]} for end in ends]
    reason: Exception | None = None
    # A cached copy serves, but for the plain weights, which may be one of several sets.
    for options in attempts[1:] if ema is False else [{"local_files_only": True}, *attempts]:
        try:
            folder = Path(snapshot_download(name, revision=revision or None, **options))
            hub_files(folder, half, ema)
            return folder
        except (OSError, HfHubHTTPError, InputError) as error:
            reason = error
    kind = str(reason) if isinstance(reason, InputError) else type(reason).__name__
    raise InputError(
        f"{repo_id} is no file or folder here, and the hub does not give it ({kind}): log in with `hf auth login` if "
        "it is closed, or give the path of a downloaded folder"
    )


# --- this project's folder -----------------------------------------------------------------------------------------


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
    config = read_json(path / "config.json")
    config.get("unet", {}).pop("use_linear_projection", None)  # of earlier folders: there is one kind of UNet now
    return config


def read_part(path: Path, part: str) -> dict[str, Tensor]:
    """The weights of one part of a folder of this project."""
    file = path / f"{part}.safetensors"
    if not file.exists():
        raise InputError(f"{path} lacks {file.name}: train it with `python train.py part={part}`")
    return read_tensors(file)


def fill(module: nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    """Copy `state` into the module. Raises InputError where it does not fit."""
    try:
        module.load_state_dict(fitted(module.state_dict(), state.items()))
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
