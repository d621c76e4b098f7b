"""Time whole edits as a user starts them: each is one cold `python edit.py`, without cached tunings and without W&B.

    python -m benchmarks.edits                  # into benchmarks/results/edits-MACHINE.{json,md}
    python -m benchmarks.edits model=sd15 model.weights=sd15.safetensors device=cuda

The bundled example with the shipped model, each method as it comes, with the settings of the command line.

"wall" is all of the process, from its start; "edit" is the method alone, as edit.py writes it into a row. Each is done
three times, in turns; given are medians and ranges. Rows of earlier runs on the same machine stay.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.writing import keep, kept, machine, table

ROOT = Path(__file__).resolve().parent.parent
METHODS = ["method=imagic", "method=direct_inversion", "method=sdedit"]
REPEATS = 3


def edit(settings: list[str], folder: Path) -> dict:
    """Run edit.py; its wall time, and the cost in the first row that it writes."""
    command = [sys.executable, str(ROOT / "edit.py"), *settings, "cache.enabled=false", "logger.mode=disabled"]
    start = time.perf_counter()
    done = subprocess.run([*command, f"hydra.run.dir={folder}"], cwd=ROOT, capture_output=True, text=True)
    wall = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(settings)}: {done.stderr[-2000:]}")
    row = json.loads((folder / "rows.jsonl").read_text().splitlines()[0])
    return {"wall": wall} | {name: row[name] for name in ("seconds", "evaluations", "peak_memory_gb")}


def report(rows: dict[str, list[dict]]) -> str:
    def column(runs: list[dict], name: str) -> str:
        values = [run[name] for run in runs]
        return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"

    names = ("wall", "seconds", "evaluations", "peak_memory_gb")
    lines = ((f"`{settings}`", *(column(runs, name) for name in names)) for settings, runs in rows.items())
    return table(["settings", "wall, s", "edit, s", "evaluations", "peak, GB"], lines)


def main() -> None:
    name = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    about, file = f"{name}, torch {torch.__version__}", f"edits-{name.split(' (')[0]}"
    cases = [[method, *sys.argv[1:]] for method in METHODS]
    found = kept(file, about).get("rows", {}) | {" ".join(case): [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(REPEATS):
            for j, case in enumerate(cases):
                found[" ".join(case)].append(edit(case, Path(folder) / f"{i}-{j}"))
                print(f"{' '.join(case)}: {found[' '.join(case)][-1]['wall']:.1f} s", file=sys.stderr, flush=True)
    keep(file, f"# Edits: {about}\n\n{report(found)}", {"machine": about, "rows": found})
    print(report(found))


if __name__ == "__main__":
    main()
