"""Time whole edits as a user starts them: each is one cold `python edit.py`, without cached tunings and without W&B.

    python -m benchmarks.edits                  # both parts, into benchmarks/results/edits-MACHINE.{json,md}
    python -m benchmarks.edits defaults --set model=sd15 model.weights=sd15.safetensors device=cuda

defaults  the bundled example with the shipped model, each method as it comes
growth    the same with more steps, larger pictures, larger batches

"wall" is all of the process, from its start; "edit" is the method alone, as edit.py writes it into a row. Repeats take
turns with those of the other rows; given are medians and ranges.
"""

import argparse
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
SHORT = ["method=imagic", "method.tuning_steps=20"]
PARTS = {
    "defaults": [["method=imagic"], ["method=direct_inversion"], ["method=sdedit"]],
    "growth": [
        *(["method=direct_inversion", f"sampler.steps={n}"] for n in (25, 50, 100, 200)),
        *(["method=direct_inversion", f"size={n}"] for n in (64, 128, 192, 256)),
        *([*SHORT, "method.embedding_steps=20", f"size={n}"] for n in (64, 128, 192)),
        *([*SHORT, "method.embedding_steps=0", f"method.tuning_batch={n}"] for n in (1, 2, 4, 8)),
    ],
}


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


def measure(cases: list[list[str]], repeats: int, folder: Path) -> list[dict]:
    runs: list[list[dict]] = [[] for _ in cases]
    for i in range(repeats):
        for j, case in enumerate(cases):
            runs[j].append(edit(case, folder / f"{i}-{j}"))
            print(f"{' '.join(case)}: {runs[j][-1]['wall']:.1f} s", file=sys.stderr, flush=True)
    return [{"settings": case, "runs": found} for case, found in zip(cases, runs, strict=True)]


def report(rows: list[dict]) -> str:
    def column(runs: list[dict], name: str) -> str:
        values = [run[name] for run in runs]
        spread = f" ({min(values):.1f}-{max(values):.1f})" if len(values) > 1 else ""
        return f"{statistics.median(values):.1f}{spread}"

    names = ("wall", "seconds", "evaluations", "peak_memory_gb")
    lines = ((f"`{' '.join(r['settings'])}`", *(column(r["runs"], name) for name in names)) for r in rows)
    return table(["settings", "wall, s", "edit, s", "evaluations", "peak, GB"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time whole edits.")
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; none: all")
    parser.add_argument("--repeats", type=int, default=3, help="of the defaults; the others are run once")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="more settings for every edit")
    options = parser.parse_args()
    if wrong := set(options.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(wrong)}: choose from {', '.join(PARTS)}")
    name = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    about, file = f"{name}, torch {torch.__version__}", f"edits-{name.split(' (')[0]}"
    found = kept(file, about).get("parts", {})
    with tempfile.TemporaryDirectory() as folder:
        for part in options.parts or PARTS:
            cases = [[*case, *options.set] for case in PARTS[part]]
            title = " ".join([part, *options.set])
            found[title] = measure(cases, options.repeats if part == "defaults" else 1, Path(folder) / part)
            text = "\n".join(f"## {title}\n\n{report(rows)}" for title, rows in found.items())
            keep(file, f"# Edits: {about}\n\n{text}", {"machine": about, "parts": found})
    print(text)


if __name__ == "__main__":
    main()
