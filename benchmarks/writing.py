"""How every benchmark names the machine and keeps what it found: a table to read and JSON to compute with."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from files import whole_file

RESULTS = Path(__file__).parent / "results"


def machine(device: torch.device | None = None) -> str:
    """The name of the card, or of the processor and the number of threads that torch uses."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{names[0]} ({torch.get_num_threads()} threads)"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def keep(name: str, text: str, data: object) -> None:
    """Write `text` and `data` into benchmarks/results/, as NAME.md and NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    stem = re.sub(r"\W+", "-", name).strip("-").lower()
    for ending, content in {"md": text, "json": json.dumps(data, indent=1) + "\n"}.items():
        with whole_file(RESULTS / f"{stem}.{ending}") as partial:
            Path(partial).write_text(content)
