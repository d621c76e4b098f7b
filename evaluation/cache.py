"""Tuned states on disk, so that a run with the same tuning as an earlier one reads it.

An entry is one safetensors file, named by a hash of everything that determines its tensors. Processes may share the
folder: entries are written whole, and a lock lets one process build while the others wait.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from errors import InputError, check
from files import whole_file


def digest(*parts: str | bytes | Tensor) -> str:
    """SHA-256 over texts, bytes and tensors (shape, dtype and values)."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            total.update(f"{tuple(part.shape)}{part.dtype}".encode())
            part = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        total.update(part.encode() if isinstance(part, str) else part)
    return total.hexdigest()


def on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a file can hold them."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


@dataclass
class TuningCache:
    """Tuned states, so that a run that differs only in what follows the tuning does not tune again."""

    group = "cache"  # its settings on the command line
    enabled: bool = True  # false: tune again
    dir: str = "~/.cache/palimpsest/tuning"  # or tuning/ in $PALIMPSEST_CACHE, where that is set
    max_gb: float = 10.0  # at most, of 10^9 bytes; the least recently used entries are removed first

    def __post_init__(self) -> None:
        check(self)
        self.folder, self.max_bytes = Path(self.dir).expanduser(), self.max_gb * 1e9

    def get(self, determined_by: dict, build: Callable[[], tuple[dict, dict]]) -> tuple[dict[str, Tensor], dict, bool]:
        """The tensors that `build` gives, on the CPU, its notes, and whether both come from the folder.
        `determined_by`, in JSON's types, names all that the tensors depend on. Notes, in JSON's types too, are stored
        beside them. An entry that cannot be written costs a warning. Raises InputError where the folder cannot be
        made."""
        path = self.folder / f"{digest(json.dumps(determined_by, sort_keys=True))}.tuning.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cache.dir={self.dir}: {error.strerror}; cache.enabled=false does without") from None
        with FileLock(path.with_suffix(".lock")):
            with suppress(OSError, SafetensorError):  # not there, or damaged
                os.utime(path)  # recently used
                with safe_open(path, framework="pt") as file:
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                    return tensors, json.loads(file.metadata()["notes"]), True
            tensors, notes = build()
            tensors = on_cpu(tensors)
            try:
                with whole_file(path) as partial:
                    save_file(tensors, partial, {"notes": json.dumps(notes)})
                left = self.max_bytes
                for entry in sorted(self.folder.glob("*.tuning.safetensors"), key=os.path.getmtime, reverse=True):
                    left -= entry.stat().st_size
                    if left < 0:
                        entry.unlink()
                        entry.with_suffix(".lock").unlink(missing_ok=True)
            except (OSError, SafetensorError) as error:  # a full disk, or another process that removes entries now
                warnings.warn(f"the tuning cache {self.folder}: {error}", stacklevel=2)
        return tensors, notes, False
