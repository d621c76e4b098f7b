"""How every benchmark names the machine and stores its results: a table to read and JSON to compute with."""

import json
import os
import platform
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

RESULTS = Path(os.environ.get("PALIMPSEST_BENCHMARKS") or Path(__file__).parent / "results")


def machine(device: torch.device | None = None) -> str:
    """The name of the card, or of the processor and the number of threads that torch uses."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    name = named[1] if named else platform.processor() or platform.machine()
    return f"{name} ({torch.get_num_threads()} threads)"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def results(name: str, ending: str) -> Path:
    """Where the results called `name` lie: NAME.md or .json in $PALIMPSEST_BENCHMARKS, or else benchmarks/results."""
    return RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.{ending}"


def kept(name: str, about: str) -> dict:
    """The data of an earlier run under that name, if its "machine" is `about`; else an empty dict."""
    path = results(name, "json")
    data = json.loads(path.read_text()) if path.exists() else {}
    return data if data.get("machine") == about else {}


def keep(name: str, text: str, data: dict) -> None:
    """Write `text` to NAME.md and `data` to NAME.json."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    results(name, "md").write_text(text)
    results(name, "json").write_text(json.dumps(data, indent=1) + "\n")
