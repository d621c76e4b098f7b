"""How every benchmark names the machine and stores its rows: a table to read and JSON to compute with."""

import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

RESULTS = Path(os.environ.get("PALIMPSEST_BENCHMARKS") or Path(__file__).parent / "results")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = bool(os.environ.get("PALIMPSEST_SMALL"))  # tiny networks and few steps, to try the benchmarks themselves
CUDA = DEVICE.type == "cuda"
DTYPE = getattr(torch, os.environ.get("PALIMPSEST_DTYPE") or ("bfloat16" if CUDA else "float32"))


def machine() -> str:
    """The name of the card, or of the processor and the number of threads that torch uses."""
    if CUDA:
        return torch.cuda.get_device_name(DEVICE)
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return f"{named[1] if named else platform.machine()} ({torch.get_num_threads()} threads)"


def now() -> float:
    """Seconds, when the device has done its work."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def peak() -> float | str:
    """The device's memory in GB, at most since the last call."""
    if not CUDA:
        return "-"
    most = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return most


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def cell(value: object) -> object:
    """A number to three digits; of several measurements the median, and the range in brackets."""
    if isinstance(value, list):
        return f"{statistics.median(value):.4g} ({min(value):.3g}-{max(value):.3g})"
    return f"{value:.4g}" if isinstance(value, float) else value


class Results:
    """Rows in NAME-MACHINE.md and .json, in $PALIMPSEST_BENCHMARKS or else benchmarks/results. Rows of an earlier run
    on the same machine stay; those that agree in the first `key` columns are one row, of what was measured last."""

    def __init__(self, name: str, title: str, key: int):
        self.about, self.title, self.key = f"{machine()}, torch {torch.__version__}", title, key
        self.file = RESULTS / re.sub(r"[^a-z0-9]+", "-", f"{name}-{machine().split(' (')[0]}".lower()).strip("-")
        stored = self.file.with_suffix(".json")
        data = json.loads(stored.read_text()) if stored.exists() else {}
        rows = data["rows"] if data.get("machine") == self.about else []
        self.rows = {tuple(row.values())[:key]: row for row in rows}

    def add(self, row: dict) -> None:
        """Write a row, or more columns of one, at once, so that an interrupted run leaves it."""
        place = tuple(row.values())[: self.key]
        self.rows[place] = self.rows.get(place, {}) | row
        head = list(dict.fromkeys(name for r in self.rows.values() for name in r))
        text = table(head, ([cell(r.get(name, "-")) for name in head] for r in self.rows.values()))
        RESULTS.mkdir(parents=True, exist_ok=True)
        self.file.with_suffix(".md").write_text(f"# {self.title}: {self.about}\n\n{text}")
        stored = json.dumps({"machine": self.about, "rows": [*self.rows.values()]}, indent=1)
        self.file.with_suffix(".json").write_text(stored + "\n")
        new = (f"{name} {cell(value)}" for name, value in [*row.items()][self.key :])
        print(*place, *new, sep="  ", file=sys.stderr, flush=True)
