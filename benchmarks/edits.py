"""Whole edits, as a user starts them: time and peak memory of each stage, and how they grow with steps, batch and size.

    python benchmarks/edits.py                  # all parts that suit the machine, into benchmarks/results/
    python benchmarks/edits.py defaults growth  # one or some: defaults, growth, sd15

defaults  the bundled example with the shipped model, each method as it comes
growth    the same with more steps, larger pictures, larger batches
sd15      networks of Stable Diffusion 1.5's size (random weights, written to a temporary folder) at 512 pixels: on CUDA
          with the published settings, on a CPU with two steps of each kind, from which a stage of any length follows

Each edit is one `python edit.py` of its own, without cached tunings and without W&B. "wall" is all of the process, from
its start; the stages are as edit.py times them. Runs of a row take turns with those of the others; given are medians
and ranges.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.writing import keep, kept, machine, table

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("defaults", "growth", "sd15")
DEFAULTS = [["method=imagic"], ["method=direct_inversion"]]
SHORT = ["method=imagic", "method.tuning_steps=20"]
GROWTH = [
    *(["method=direct_inversion", f"sampler.steps={n}"] for n in (25, 50, 100, 200)),
    *(["method=direct_inversion", f"size={n}"] for n in (64, 128, 192, 256)),
    *([*SHORT, "method.embedding_steps=20", f"size={n}"] for n in (64, 128, 192)),
    *([*SHORT, "method.embedding_steps=0", f"method.tuning_batch={n}"] for n in (1, 2, 4, 8)),
]
FEW = [
    ["method=direct_inversion", "sampler.steps=2"],
    ["method=imagic", "method.embedding_steps=2", "method.tuning_steps=2", "method.tune=lora", "sampler.steps=2"],
]


def edit(settings: list[str], folder: Path) -> dict:
    """Run edit.py; seconds and bytes."""
    command = [sys.executable, str(ROOT / "edit.py"), *settings, "cache.enabled=false", "logger.mode=disabled"]
    start = time.perf_counter()
    done = subprocess.run([*command, f"hydra.run.dir={folder}"], cwd=ROOT, capture_output=True, text=True)
    wall = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(settings)}: {done.stderr[-2000:]}")
    timings = json.loads((folder / "timings.json").read_text())
    return {"wall": wall, "seconds": timings["seconds"], "peaks": timings["peak_memory_bytes"]}


def measure(cases: list[list[str]], repeats: int, folder: Path) -> list[dict]:
    runs: list[list[dict]] = [[] for _ in cases]
    for i in range(repeats):
        for j, case in enumerate(cases):
            runs[j].append(edit(case, folder / f"{i}-{j}"))
            print(f"{' '.join(case)}: {runs[j][-1]['wall']:.1f} s", file=sys.stderr, flush=True)
    return [{"settings": case, "runs": found} for case, found in zip(cases, runs, strict=True)]


def report(rows: list[dict]) -> str:
    def seconds(values: list[float]) -> str:
        spread = f" ({min(values):.1f}-{max(values):.1f})" if len(values) > 1 else ""
        return f"{statistics.median(values):.1f}{spread}"

    lines = []
    for row in rows:
        runs = row["runs"]
        stages = {name: [run["seconds"][name] for run in runs] for name in runs[0]["seconds"] if name != "metrics"}
        peaks = [max(run["peaks"].values()) / 1e9 for run in runs]
        each = ", ".join(f"{name} {seconds(values)}" for name, values in stages.items())
        given = " ".join(s for s in row["settings"] if not s.startswith("model"))
        lines.append((f"`{given}`", seconds([run["wall"] for run in runs]), each, f"{statistics.median(peaks):.2f}"))
    return table(["settings", "wall, s", "stages, s", "peak, GB"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time whole edits.")
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; none: all")
    parser.add_argument("--repeats", type=int, default=3, help="of the defaults; the others are run once")
    options = parser.parse_args()
    if wrong := set(options.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(wrong)}: choose from {', '.join(PARTS)}")
    cuda = torch.cuda.is_available()
    name = machine(torch.device("cuda" if cuda else "cpu"))
    about, file = f"{name}, torch {torch.__version__}", f"edits-{name.split(' (')[0]}"
    found = kept(file, about).get("parts", {})
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for part in options.parts or PARTS:
            if part == "defaults":
                found[part] = measure(DEFAULTS, options.repeats, place / part)
            elif part == "growth":
                found[part] = measure(GROWTH, 1, place / part)
            else:
                weights = stable_diffusion(place)
                cases = [["model=sd15", f"model.weights={weights}", *case] for case in (DEFAULTS if cuda else FEW)]
                found[part] = measure(cases, 1, place / part)
                for row in found[part]:
                    row["settings"].remove(f"model.weights={weights}")
            parts = (f"## {part}\n\n{report(found[part])}" for part in PARTS if part in found)
            text = f"# Edits: {about}\n\n" + "\n".join(parts)
            keep(file, text, {"machine": about, "parts": found})  # now, in case the rest is interrupted
    print(text)


def stable_diffusion(folder: Path) -> Path:
    """A file of Stable Diffusion 1.5's sizes in half precision, random."""
    from tests import stable_diffusion as sd

    sizes = {**sd.PUBLISHED[1], "prediction": "epsilon"}
    return sd.write_single_file(folder / "sd15.safetensors", sd.make_checkpoint(sizes), sizes, 1, torch.float16)


if __name__ == "__main__":
    main()
