"""Loading and saving models: this project's own folder, and Stable Diffusion in either of its layouts.

A folder of this project holds `config.json` (all sizes, readable) and one safetensors file for each part that is
trained on its own: `autoencoder`, `clip` (text and image towers) and `unet`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from errors import InputError
from files import whole_file
from models import hub
from models.latent_diffusion import LatentDiffusion, build
from models.layouts import FOLDERS, Pieces, from_folder, from_single_file
from models.recognise import SECTIONS, architecture, configured, foreign, merged, stacked_shape
from models.weights import mappable, read_tensors, stated_prediction

PARTS = ("autoencoder", "clip", "unet")
CHUNK = 256 * 2**20  # bytes
SECTIONS_OF = {"autoencoder": ["vae"], "clip": ["text", "vision"], "unet": ["unet", "schedule", "prediction"]}


def load(
    path: str | os.PathLike,
    arch: Mapping | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    ema: bool | None = None,
) -> LatentDiffusion:
    """The model at `path`: a folder written by `save`, or a Stable Diffusion 1.x or 2.x as a single file (.safetensors,
    .ckpt), as a folder in the model hub's layout, or as a hub id ("org/name"), which is fetched once.

    Its sizes are recognised; `arch` adds what weights do not tell, in the form of config.json: any of `unet`, `vae`,
    `text`, `schedule`, `prediction` and `image_size`. `ema` chooses between the UNet's averaged weights (True) and the
    plain ones (False) where a checkpoint has both; None is the averaged where there are some.

    On the CPU, weights stored in `dtype` stay mapped to their file: keep it as it is while the model is used. Raises
    InputError for a path that is missing, incomplete, damaged, of another kind or at odds with `arch`.
    """
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise InputError(f"the weights are {path!r}: name a file, a folder or a hub id")
    if arch is not None and not isinstance(arch, Mapping):
        raise InputError(f"arch is {arch!r}: it must name sizes, as in {{'unet': {{'num_heads': 8}}}}")
    source = Path(path)
    if not source.exists():
        if not hub.looks_like_id(str(path)):
            raise InputError(f"there is no checkpoint at {path}")
        source = hub.fetch(str(path), half=dtype == torch.float16, ema=ema)
    if source.is_dir() and not (source / "unet").is_dir():
        if ema is False:
            raise InputError(f"ema=false, and {source} holds averaged weights alone: leave ema out")
        model = load_own(source, arch, device, dtype)
    else:
        model = load_stable_diffusion(source, arch, device, dtype, ema)
    return model.eval().requires_grad_(False)


def load_own(
    path: Path, arch: Mapping | None, device: str | torch.device | None, dtype: torch.dtype
) -> LatentDiffusion:
    """The model in a folder written by `save`."""
    config = read_config(path)
    if arch:
        try:
            config = merged(config, arch, sure=SECTIONS)
        except InputError as error:
            raise InputError(f"{path} is a model of this project, as model=openmoji64 is: {error}") from None
    files = {part: part_file(path, part) for part in PARTS}
    model = build_from(config, path / "config.json", read_tensors(files["clip"]).get("text.vocabulary"))
    for part, file in files.items():
        parts = {part: part_of(model, part)}

        def read(part=part, file=file) -> dict[str, Pieces]:
            return {part: unstacked(read_tensors(file))}

        check_fit(parts, read(), [], file)
        pour(parts, read, device, dtype)
    return model.to(device)


def load_stable_diffusion(
    path: Path, arch: Mapping | None, device: str | torch.device | None, dtype: torch.dtype, ema: bool | None
) -> LatentDiffusion:
    """The Stable Diffusion in a single file or in a folder of the hub's layout."""
    files = hub_files(path, dtype == torch.float16, ema) if path.is_dir() else {}
    whole = None if files or mappable(path) else read_tensors(path)

    def tensors() -> dict[str, Tensor]:
        return whole or read_tensors(path)

    def read() -> tuple[dict[str, Pieces], list[str]]:
        if files:
            return from_folder({folder: read_tensors(names) for folder, names in files.items()})
        return from_single_file(tensors(), ema)

    try:
        if not files and (kind := foreign(tensors())):
            raise InputError(kind)
        pieces, problems = read()
        told, sure = architecture(pieces), {"unet", "vae", "text"}
        if files:
            configs = hub_configs(path)
            told = configured(told, configs)
            sure |= {"schedule", "prediction"} if configs["scheduler"] else set()
        elif (stated := stated_prediction(path)) is not None:
            told["prediction"] = stated
            sure.add("prediction")
        config = merged(told, arch, sure)
    except InputError as error:  # what reads a file names it, what looks at names and shapes does not
        raise error if str(path) in str(error) else InputError(f"{path}: {error}") from None
    model = build_from(config, f"{path} with the arch that is given" if arch else path)
    stored = None if files else tensors().get("alphas_cumprod")
    if stored is not None and stored.is_floating_point():
        own, rounding = model.schedule.alpha_bars, torch.finfo(stored.dtype).eps
        if stored.shape != own.shape or not (stored.double() - own).abs().max() < 1e-4 + rounding:
            raise InputError(f"{path} was trained with another noise schedule (its alphas_cumprod): give arch.schedule")
    parts = {part: getattr(model, part) for part in pieces}
    check_fit(parts, pieces, problems, path)
    pour(parts, lambda: read()[0], device, dtype)
    return model.to(device)


def hub_files(path: Path, half: bool, ema: bool | None) -> dict[str, list[Path]]:
    """The weight files of each folder of the hub's layout."""
    if (path / "text_encoder_2").is_dir():
        raise InputError(f"{path} seems to hold an SDXL, which is not supported: Stable Diffusion 1.x and 2.x are")
    names = [file.relative_to(path).as_posix() for file in path.glob("*/*") if file.is_file()]
    try:
        return {folder: [path / name for name in hub.part_files(names, folder, half, ema)] for folder in FOLDERS}
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def hub_configs(path: Path) -> dict[str, dict]:
    """What the config files of the hub's layout say, {} for a file that is not there."""
    files = {folder: f"{folder}/config.json" for folder in FOLDERS}
    files |= {"scheduler": "scheduler/scheduler_config.json", "tokenizer": "tokenizer/special_tokens_map.json"}
    return {name: read_json(path / file) if (path / file).exists() else {} for name, file in files.items()}


def build_from(config: Mapping, source: str | Path, vocabulary: Tensor | None = None) -> LatentDiffusion:
    """`build` without weights, of a user's sizes: what they lack or cannot be is an InputError that names `source`."""
    try:
        return build(config, vocabulary=vocabulary, meta=True)
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
    if not (path / "config.json").exists():
        raise InputError(
            f"{path} holds neither a config.json of this project nor the hub's folders {', '.join(FOLDERS)}"
        )
    return read_json(path / "config.json")


def read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no settings by name")
    return content


def part_file(path: Path, part: str) -> Path:
    """Where one part of a folder of ours is stored."""
    file = path / f"{part}.safetensors"
    if not file.exists():
        raise InputError(f"{path} lacks {file.name}: train it with `python train.py part={part}`")
    return file


def read_part(path: Path, part: str) -> dict[str, Tensor]:
    """The weights of one part of a folder of ours."""
    return read_tensors(part_file(path, part))


def check_fit(
    parts: Mapping[str, nn.Module], pieces: Mapping[str, Pieces], problems: Sequence[str], source: Path
) -> None:
    """Raise InputError, naming the first keys that are missing, unexpected or of another shape, and counting them."""
    problems = list(problems)
    named = " (in this project's names)" if len(parts) > 1 else ""
    for part, module in parts.items():
        prefix = f"{part}." if len(parts) > 1 else ""
        own, found = module.state_dict(), pieces[part]
        problems += [f"{prefix}{k} is missing" for k in own if k not in found]
        problems += [f"{prefix}{k} is unexpected" for k in found if k not in own]
        for k in own:
            if k in found and own[k].is_floating_point() != all(t.is_floating_point() for t in found[k]):
                problems.append(f"{prefix}{k} is {found[k][0].dtype} where {own[k].dtype} fits")
            elif k in found and (shape := stacked_shape(found[k])) != tuple(own[k].shape):
                problems.append(f"{prefix}{k} is {shape} where {tuple(own[k].shape)} fits")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InputError(f"{source} does not fit the networks{named}: {'; '.join(problems[:3])}{more}")


def unstacked(state: Mapping[str, Tensor]) -> Pieces:
    return {name: [tensor] for name, tensor in state.items()}


def fill(module: nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    """Copy `state` into the module. Raises InputError where it does not fit; see `check_fit`."""
    check_fit({"": module}, {"": unstacked(state)}, [], source)
    module.load_state_dict(state)


def pour(
    parts: Mapping[str, nn.Module],
    read: Callable[[], Mapping[str, Pieces]],
    device: str | torch.device | None,
    dtype: torch.dtype,
) -> None:
    """Give modules on the meta device their weights, which `check_fit`, in `dtype` and on `device`: as they lie in the
    mapped file where nothing is to be changed, so that none is copied and no memory is taken twice.

    `read` maps the files anew. It is called again after every `CHUNK` bytes, because the pages that a mapping has
    touched count as memory until it is dropped.
    """
    pieces, touched = read(), 0
    for part, module in parts.items():
        state = {}
        for name in list(pieces[part]):
            tensors = pieces[part][name]
            tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
            state[name] = tensor.to(device, dtype if tensor.is_floating_point() else None)
            if state[name] is not tensors[0]:
                touched += sum(t.nbytes for t in tensors)
            if touched > CHUNK:
                del tensors, tensor
                pieces, touched = read(), 0
        module.load_state_dict(state, assign=True)
