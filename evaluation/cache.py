"""Tuned states on disk, so that a run with the same tuning as an earlier one reads it.

An entry is one safetensors file, named by a hash of everything that determines its tensors. Processes may share the
folder: entries are written whole, and a lock lets one process build while the others wait.
"""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from errors import InputError
from files import whole_file

CLONE = Path(__file__).resolve().parent.parent


def digest(*parts: str | bytes | Tensor) -> str:
    """SHA-256 over texts, bytes and tensors (shape, dtype and values)."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            total.update(f"{tuple(part.shape)}{part.dtype}".encode())
            part = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        total.update(part.encode() if isinstance(part, str) else part)
    return total.hexdigest()


def code_fingerprint(files: Iterable[Path], clone: Path = CLONE) -> str:
    """A hash of the code that a tuning runs: `files`, those of the method, and all samplers and networks."""
    shared = {file for room in ("samplers", "models") for file in (clone / room).glob("*.py")}
    return digest(*(file.read_bytes() for file in sorted(shared | set(files))))


class TuningCache:
    """At most `max_gb` (10^9 bytes) in the folder `dir`; the least recently used entries are removed first."""

    def __init__(self, enabled: bool = True, dir: str = "~/.cache/palimpsest/tuning", max_gb: float = 10.0):
        if isinstance(max_gb, bool) or not isinstance(max_gb, int | float) or not 0 < max_gb < math.inf:
            raise InputError(f"cache.max_gb={max_gb} is out of range: a number above 0, or cache.enabled=false")
        self.enabled, self.dir, self.max_bytes = enabled, Path(dir).expanduser(), int(max_gb * 1e9)

    def get(
        self, determined_by: dict, build: Callable[[], tuple[dict[str, Tensor], dict]]
    ) -> tuple[dict[str, Tensor], dict, bool]:
        """The tensors that `build` gives, on the CPU, its notes, and whether both come from the folder.

        `determined_by`, in JSON's types, names all that the tensors depend on. Notes, in JSON's types too, are stored
        beside them. A folder that cannot be used costs a warning, not the run.
        """
        if not self.enabled:
            return *on_cpu(*build()), False
        path = self.dir / f"{digest(json.dumps(determined_by, sort_keys=True))}.safetensors"
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.with_suffix(".lock")).acquire()
        except OSError as error:  # the folder is read-only, or its disk has no locks
            warnings.warn(f"the tuning cache {self.dir} cannot be used: {error}", stacklevel=2)
            return *on_cpu(*build()), False
        with lock:
            with suppress(OSError, SafetensorError):  # not there, or damaged
                os.utime(path)  # recently used
                with safe_open(path, framework="pt") as file:
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                    return tensors, json.loads(file.metadata()["notes"]), True
            tensors, notes = on_cpu(*build())
            try:
                self.write(path, tensors, {"notes": json.dumps(notes)})
            except (OSError, SafetensorError) as error:
                warnings.warn(f"this tuning could not be written to {self.dir}: {error}", stacklevel=2)
        return tensors, notes, False

    def write(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        """Write an entry whole, and then remove others, the least recently used first, until all fit."""
        with whole_file(path) as partial:
            save_file(tensors, partial, metadata)
        left = self.max_bytes
        for file in sorted(self.dir.glob("*.safetensors"), key=modified, reverse=True):
            with suppress(FileNotFoundError):  # another process has just removed it
                left -= file.stat().st_size
                if left < 0:
                    file.unlink()
                    file.with_suffix(".lock").unlink(missing_ok=True)


def modified(file: Path) -> float:
    return file.stat().st_mtime if file.exists() else 0.0


def on_cpu(tensors: dict[str, Tensor], notes: dict) -> tuple[dict[str, Tensor], dict]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, notes
