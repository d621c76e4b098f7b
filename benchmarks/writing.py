"""How every benchmark names the machine and stores its rows: a table to read and JSON to compute with."""

import json
import os
import platform
import re
import statistics
import sys
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
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    processor = f"{named[1] if named else platform.machine()} ({torch.get_num_threads()} threads)"
    return torch.cuda.get_device_name(DEVICE) if CUDA else processor


def peak() -> float | str:
    """The most memory of the CUDA device that was in use since the last call, in GB."""
    most = torch.cuda.max_memory_allocated() / 1e9
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    return most or "-"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in (head, ["---"] * len(head), *rows))


def cell(value: object) -> object:
    """A number to four digits, or whole; of several measurements the median, and the range in brackets."""
    if isinstance(value, list):
        return f"{cell(statistics.median(value))} ({cell(min(value))}-{cell(max(value))})"
    return value if not isinstance(value, float) else f"{value:.4g}" if value < 1000 else round(value)


class Results:
    """Rows in NAME-MACHINE.md and .json, in $PALIMPSEST_BENCHMARKS or else benchmarks/results. Rows of an earlier run
    there stay; those that agree in the first `key` columns are one row, of what was measured last."""

    def __init__(self, name: str, title: str, key: int):
        self.about, self.title, self.key = f"{machine()}, torch {torch.__version__}", title, key
        self.file = RESULTS / re.sub(r"[^a-z0-9]+", "-", f"{name} {self.about}".lower())
        stored = self.file.with_suffix(".json")
        rows = json.loads(stored.read_text())[self.about] if stored.exists() else []
        self.rows = {tuple(row.values())[:key]: row for row in rows}

    def add(self, row: dict) -> None:
        """Write a row, or more columns of one, at once, so that an interrupted run leaves it."""
        place = tuple(row.values())[: self.key]
        self.rows[place] = self.rows.get(place, {}) | row
        head = list(dict.fromkeys(name for r in self.rows.values() for name in r))
        text = table(head, ([cell(r.get(name, "-")) for name in head] for r in self.rows.values()))
        RESULTS.mkdir(parents=True, exist_ok=True)
        self.file.with_suffix(".md").write_text(f"# {self.title}: {self.about}\n\n{text}")
        self.file.with_suffix(".json").write_text(json.dumps({self.about: [*self.rows.values()]}, indent=1) + "\n")
        print(*(f"{name} {cell(value)}" for name, value in row.items()), sep=", ", file=sys.stderr, flush=True)
