"""The tensors in weight files, by name and memory-mapped: nothing is read before it is used, and nothing is executed.

A file's kind is told from its first bytes, not from its name. What holds no tensors gets a sentence that says what it
seems to be.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from errors import InputError

SIGNATURES = {  # first bytes of what people name by mistake
    b"version https://git-lfs": "a Git LFS pointer and not the weights themselves: fetch them with `git lfs pull`",
    b"<": "a web page, perhaps that of the download: save the file itself",
    b"GGUF": "a GGUF file, quantised for other programs: take the .safetensors file of the same release",
    b"\x89PNG": "a picture",
    b"\xff\xd8": "a picture",
}
PREDICTIONS = {"v": "v", "v_prediction": "v", "epsilon": "epsilon", "eps": "epsilon"}


def read_tensors(files: Path | Iterable[Path]) -> dict[str, Tensor]:
    """All tensors of a .safetensors or a PyTorch file (.ckpt, .bin, .pt), or of several files that share a model, on
    the CPU. They stay mapped: a page is read when it is touched, and let go when the last tensor of this call is.

    Raises InputError for a file that is damaged, cut short, of another kind, or a pickle that needs more than tensors.
    """
    tensors: dict[str, Tensor] = {}
    for file in [files] if isinstance(files, Path) else files:
        try:
            with open(file, "rb") as stream:
                start = stream.read(64)
        except OSError as error:  # a link to nowhere, no permission
            raise InputError(f"{file} cannot be read: {error.strerror}") from None
        if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
            tensors |= read_pickle(file, zipped=start[:2] == b"PK")
        elif start[8:9] == b"{":
            tensors |= read_safetensors(file)
        else:
            raise InputError(f"{file} {seems(start, file)}")
    return tensors


def mappable(file: Path) -> bool:
    """Whether `read_tensors` maps the file; PyTorch's format of before 2020 (1.6) is read whole each time."""
    with open(file, "rb") as stream:
        return stream.read(1) != b"\x80"


def seems(start: bytes, file: Path) -> str:
    """What a file without tensors is, from its first bytes."""
    if not start:
        return "is empty"
    for signature, kind in SIGNATURES.items():
        if start.lstrip().startswith(signature):
            return f"is {kind}"
    try:
        start[:60].decode()  # 60: a cut character at the end of 64 bytes would not decode
        return "seems to be a text file: weights are .safetensors or .ckpt files"
    except UnicodeDecodeError:
        return "is damaged or no weight file: .safetensors and .ckpt files hold weights"


def read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (no iteration protocol)
    except SafetensorError as error:
        raise InputError(f"{file} is {cut_short(file) or f'damaged or no safetensors file: {error}'}") from None


def cut_short(file: Path) -> str | None:
    """A sentence's end where a safetensors file is shorter than its header says."""
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        actual = file.stat().st_size
        expected = 8 + length
        if expected <= actual:
            try:
                header = json.loads(stream.read(length))
                expected += max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
            except (ValueError, TypeError, KeyError, RecursionError):
                return None
    return f"cut short: {actual:,} of {expected:,} bytes. Download it again" if expected > actual else None


def read_pickle(file: Path, zipped: bool) -> dict[str, Tensor]:
    """The tensors of a file that `torch.save` wrote, those under "state_dict" where there is such an entry."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError:
        raise InputError(f"{file} {needs(file, zipped)}") from None
    except (
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        AttributeError,
        IndexError,
        AssertionError,
        OSError,
        SafetensorError,
    ):
        raise InputError(f"{file} is damaged, cut short or no PyTorch file: download it again") from None
    if isinstance(content, Mapping):
        content = content.get("state_dict", content)
    if not isinstance(content, Mapping):
        raise InputError(f"{file} holds a {type(content).__name__} and no tensors by name")
    tensors = {name: t for name, t in content.items() if isinstance(name, str) and isinstance(t, Tensor)}
    if content and not tensors:
        raise InputError(f"{file} holds no tensors by name, but {', '.join(map(str, list(content)[:3]))}")
    return tensors


def needs(file: Path, zipped: bool) -> str:
    """Why a pickle is refused, with the names that it would have imported."""
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file)) if zipped else []
    except pickle.UnpicklingError:  # a protocol of which torch reads no more than it must
        names = []
    wanted = f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
    return (
        f"is a pickle that needs more than tensors{wanted}, and unpickling that could run code of whoever wrote it: "
        "take the .safetensors file of the same release, or save its state_dict alone where you trust it"
    )


def stated_prediction(file: Path) -> str | None:
    """ "epsilon" or "v" where a safetensors file says so in its metadata (`modelspec.prediction_type`)."""
    try:
        with safe_open(file, "pt") as tensors:
            return PREDICTIONS.get((tensors.metadata() or {}).get("modelspec.prediction_type"))
    except SafetensorError:
        return None
