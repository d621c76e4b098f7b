"""Tuned states on disk, so that a run that differs only in what comes after tuning does not tune again.

An entry is one safetensors file, named by a hash of everything that determined it. Jobs of a sweep may share
the folder: an entry appears whole, and whoever wants one that is being built waits for it. Nothing here may
cost a run: where the folder cannot be used the state is simply built, with a warning.
"""

import functools
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from errors import InputError
from files import whole_file

log = logging.getLogger(__name__)
STARTED = time.time()


def digest(*parts: str | bytes | Tensor) -> str:
    """SHA-256 over strings, bytes and tensors (shape, dtype and values)."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            total.update(f"{tuple(part.shape)}{part.dtype}".encode())
            part = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        total.update(part.encode() if isinstance(part, str) else part)
    return total.hexdigest()


@functools.cache  # so that it stays that of the code which this process has loaded
def code_fingerprint() -> str:
    """A hash of the code that tunes: after a change to it, what it tuned before is not taken for its work."""
    clone = Path(__file__).resolve().parent.parent
    rooms = ("methods", "models", "samplers")
    return digest(*(f.read_bytes() for room in rooms for f in sorted((clone / room).glob("*.py"))))


class TuningCache:
    """`dir` holds at most `max_gb` (10^9 bytes). Beyond it the least recently used entries are removed, and then, of
    those that this process has used or written, the latest that are not smaller than the new one: a sweep that comes
    to each tuning several times in a row finds it, and one that goes round and round finds the first ones."""

    def __init__(self, enabled: bool = True, dir: str = "~/.cache/palimpsest/tuning", max_gb: float = 10.0):
        if not isinstance(enabled, bool):
            raise InputError(f"cache.enabled={enabled} is unknown: true or false")
        if isinstance(max_gb, bool) or not isinstance(max_gb, int | float) or not 0 < max_gb < math.inf:
            raise InputError(f"cache.max_gb={max_gb} is out of range: a number above 0, or cache.enabled=false")
        self.enabled, self.dir, self.max_bytes = enabled, Path(dir).expanduser(), int(max_gb * 1e9)
        self.told = False

    def get(self, determined_by: dict, build: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], bool]:
        """What `build` gives, on the CPU, and whether it was found here. `determined_by` holds, in JSON's
        types, everything that it depends on."""
        if not self.enabled:
            return _to_cpu(build()), False
        path = self.dir / f"{digest(json.dumps(determined_by, sort_keys=True))}.safetensors"
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            log.warning("the tuning cache %s cannot be used: %s", self.dir, error)
            return _to_cpu(build()), False
        with _lock(path.with_suffix(".lock")):
            tensors = self._read(path)
            if tensors is not None:
                return tensors, True
            tensors = _to_cpu(build())
            self._write(path, tensors, determined_by)
        return tensors, False

    def _read(self, path: Path) -> dict[str, Tensor] | None:
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                metadata = file.metadata() or {}
            if metadata.get("checksum") != _checksum(tensors):
                raise ValueError("its checksum does not fit")
            os.utime(path)  # recently used
            return tensors
        except (SafetensorError, OSError, ValueError) as error:
            log.warning("the cached tuning %s is damaged and is built again (%s)", path, error)
            return None

    def _write(self, path: Path, tensors: dict[str, Tensor], determined_by: dict) -> None:
        metadata = {
            "checksum": _checksum(tensors),
            "determined_by": json.dumps(determined_by, sort_keys=True),
        }
        try:
            if self._make_room(sum(t.numel() * t.element_size() for t in tensors.values()), path):
                with whole_file(path) as partial:
                    save_file(tensors, partial, metadata)
        except (SafetensorError, OSError) as error:
            log.warning("this tuning could not be kept in %s: %s", self.dir, error)

    def _make_room(self, size: int, path: Path) -> bool:
        """Remove what may go until `size` bytes fit in `path`; False, and nothing is removed, where they cannot."""
        entries = []
        for file in self.dir.glob("*.safetensors"):
            with suppress(FileNotFoundError):  # another job has just removed it
                if file != path:
                    entries.append((file.stat().st_mtime, file.stat().st_size, file))
        old = sorted(entry for entry in entries if entry[0] < STARTED)
        ours = sorted((entry for entry in entries if entry[0] >= STARTED), reverse=True)
        if size + sum(taken for _, taken, _ in ours) > self.max_bytes and not self.told:
            log.warning("cache.max_gb is too small for all of this run's tunings: some are not kept")
            self.told = True
        removable = old + [entry for entry in ours if entry[1] >= size]
        total = size + sum(taken for _, taken, _ in entries)
        if total - sum(taken for _, taken, _ in removable) > self.max_bytes:
            return False
        for _, taken, file in removable:
            if total > self.max_bytes:
                file.unlink(missing_ok=True)
                file.with_suffix(".lock").unlink(missing_ok=True)
                total -= taken
        return True


def _to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _checksum(tensors: dict[str, Tensor]) -> str:
    return digest(*(part for name in sorted(tensors) for part in (name, tensors[name])))


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold `path` against other processes, as far as the system can; a dead holder's lock is void."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system: two jobs may then build the same entry, which is safe
        yield
        return
    try:
        file = open(path, "w")  # noqa: SIM115 (closed below)
    except OSError as error:  # a folder that may only be read
        log.debug("no lock on %s: %s", path, error)
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another job that tunes the same")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # a network folder without locks
            log.debug("no lock on %s: %s", path, error)
        yield
