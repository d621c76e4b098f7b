"""The model hub's folder layout: which of a repository's files are needed, and fetching them.

A repository has one sub-folder for each network (`unet/`, `vae/`, `text_encoder/`), often with the same weights
several times: as safetensors and as pickles, in half precision, before the moving average, in one file or in shards.
"""

import fnmatch
import re
from collections.abc import Iterable
from pathlib import Path

from errors import InputError
from models.layouts import FOLDERS

CONFIGS = ("model_index.json", "tokenizer/*_config.json", "tokenizer/special_tokens_map.json", "scheduler/*.json")

# diffusion_pytorch_model.fp16-00001-of-00002.safetensors; older releases have the variant after the shard's number
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(fp16|bf16|non_ema))?"
    r"(?:-\d+-of-(\d+))?(?:\.(fp16|bf16|non_ema))?\.(safetensors|bin)"
)


def part_files(names: Iterable[str], part: str, half: bool = False, ema: bool | None = None) -> list[str]:
    """The weight file of one network, or all its shards in order, of the files `names` in the hub's layout.

    `names` are relative to the repository, with "/" ("unet/diffusion_pytorch_model.safetensors"); `part` is a
    sub-folder ("unet"). One complete set is chosen: safetensors before pickles; half precision only with `half` or
    where there is nothing else; for `ema=False` the weights before the moving average, where they are kept apart. A
    shard's name tells how many there are, so no index is read. Raises InputError where no set is complete, and for
    `ema=True` where nothing tells the moving average from the plain weights.
    """
    found: dict[tuple[str, int, str], list[str]] = {}  # (variant, number of shards or 0, kind) -> files
    for name in sorted(set(names)):
        folder, _, file = name.rpartition("/")
        if folder == part and (match := WEIGHTS.fullmatch(file)):
            variant, kind = match[1] or match[3] or "", match[4]
            found.setdefault((variant, int(match[2] or 0), kind), []).append(name)
    # where there is no number, there is one file, or the same under two names
    sets = {key: files if key[1] else files[:1] for key, files in found.items() if key[1] in (0, len(files))}
    if not sets:
        lacking = [f"of the {count} shards like {files[0]} only {len(files)}" for (_, count, _), files in found.items()]
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        raise InputError(
            f"{part}/ has no complete weights: " + "; ".join(lacking or [f"no {stem}.safetensors or the like"])
        )
    smoothed = {variant != "non_ema" for variant, _, _ in sets}
    if ema and part == "unet" and smoothed != {True, False}:
        raise InputError("nothing says that the weights in unet/ are a moving average: leave ema unset")

    def rank(key: tuple[str, int, str]) -> tuple[bool, ...]:
        variant, count, kind = key
        short = variant in ("fp16", "bf16")
        return (variant == "non_ema") != (ema is False), short != half, variant == "bf16", kind == "bin", count > 0

    return sets[min(sets, key=rank)]


def needed(names: Iterable[str], half: bool = False, ema: bool | None = None) -> list[str]:
    """Those of a repository's files that a model is made of: `part_files` of each network and the configs, no more.
    Raises InputError as `part_files` does."""
    names = list(names)
    patterns = [*CONFIGS, *(f"{part}/*.json" for part in FOLDERS)]
    configs = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    return [*configs, *(file for part in FOLDERS for file in part_files(names, part, half, ema))]


def looks_like_id(text: str) -> bool:
    """Whether `text` has the form of a hub id, "org/name" or "org/name@revision", and not that of a weights file."""
    word = r"[A-Za-z0-9][\w.-]*"
    file = text.endswith((".safetensors", ".ckpt", ".bin", ".pt", ".pth"))
    return (
        not file
        and ".." not in text
        and "--" not in text
        and re.fullmatch(rf"{word}/{word}(@[\w./-]+)?", text, re.ASCII) is not None
    )


def fetch(repo_id: str, half: bool = False, ema: bool | None = None) -> Path:
    """The folder of the repository "org/name", or "org/name@revision", in huggingface_hub's cache, complete with what
    a model needs; what is not there yet is downloaded. Where the hub cannot be asked, what the cache has must do.

    Raises InputError where the repository has no such weights, is not there or is closed, or for want of a network.
    """
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    name, _, revision = repo_id.partition("@")
    revision = revision or None
    try:
        listed = HfApi().model_info(name, revision=revision, timeout=10).siblings or []
        files = needed((file.rfilename for file in listed), half, ema)
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except InputError as error:
        raise InputError(f"the hub's {repo_id} is not in the layout of Stable Diffusion: {error}") from None
    except (OSError, HfHubHTTPError.__bases__[0]) as error:  # of requests or httpx, whichever the library uses
        if isinstance(error, OSError) and error.errno:
            raise  # the system's own, such as a full disk
        reason = error
    known = try_to_load_from_cache(name, "unet/config.json", revision=revision)
    if isinstance(known, str):
        folder = Path(known).parent.parent
        try:
            needed((file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()), half, ema)
            return folder
        except InputError as error:
            reason = error
    raise InputError(refusal(repo_id, reason)) from None


def refusal(repo_id: str, error: Exception) -> str:
    """Why `repo_id` could not be fetched, and what to do without."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        why = "the hub asks you to accept its terms on its page there, then to log in here (`hf auth login`)"
    elif isinstance(error, RepositoryNotFoundError):
        why = "there is no such file or folder here, nor on the hub, unless it is private (`hf auth login`)"
    elif isinstance(error, RevisionNotFoundError):
        why = "the repository has no such revision"
    elif isinstance(error, InputError):
        why = f"the hub cannot be reached, and its cache here is incomplete ({error})"
    else:
        why = f"there is no such file or folder here, and the hub cannot be reached ({type(error).__name__})"
    return (
        f"model.weights={repo_id}: {why}. By hand: download unet/, vae/ and text_encoder/ (config.json, .safetensors), "
        f"scheduler/ and tokenizer/ from huggingface.co/{repo_id.partition('@')[0]} into one folder and set "
        "model.weights=FOLDER"
    )
