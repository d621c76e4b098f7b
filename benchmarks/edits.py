"""Time whole edits as a user starts them, and the stages of Imagic.

    python -m benchmarks.edits model=sd15 model.weights=sd15.safetensors
    python -m benchmarks.edits --stages sd15

Edits are cold runs of `edit.py` on the bundled example: "wall" is the process, "edit" the method alone. Stages are
Imagic's by way of tuning, with Stable Diffusion 1.5 at 512 pixels (random weights) or the shipped model: `--count`
steps of A and of B, extrapolated to the paper's 1000 and 1500.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path

import torch
from torch.utils.benchmark import timer

import models
from benchmarks.writing import CUDA, DEVICE, DTYPE, SMALL, Results, peak
from data.tasks import EditTask
from files import CLONE
from methods.base import Run, perform
from methods.imagic import Imagic
from models.names import FAMILIES
from samplers import Sampler

PAPER = {"embedding": 1000, "tuning": 1500, "editing": 50}  # steps of the stages


def edit(settings: list[str], folder: Path) -> dict[str, float]:
    """Run edit.py; its wall time, and the cost in the first row that it writes."""
    command = [sys.executable, str(CLONE / "edit.py"), *settings, "cache.enabled=false", "logger.mode=disabled"]
    start = timer()
    subprocess.run([*command, f"hydra.run.dir={folder}"], cwd=CLONE, stdout=subprocess.DEVNULL, check=True)
    wall = timer() - start
    row = json.loads((folder / "rows.jsonl").read_text().splitlines()[0])
    return {"wall, s": wall, "edit, s": row["seconds"], "evaluations": row["evaluations"], "GB": row["peak_memory_gb"]}


class Clock(Run):
    """Milliseconds of a step, by stage."""

    def progress(self, stage: str) -> Callable[[Iterable], Iterator]:
        def timed(steps: Iterable) -> Iterator:
            start, steps = timer(), list(steps)
            yield from steps
            setattr(self, stage, 1e3 * (timer() - start) / len(steps))

        return timed


def stages(name: str, count: int, compiled: bool) -> None:
    """Time Imagic's stages with each way of tuning."""
    if name == "sd15" and not SMALL:
        with DEVICE:
            model = models.build(FAMILIES["cond_stage_model.transformer."] | {"schedule": {}})
    else:
        model = models.load(CLONE / "checkpoints" / "openmoji64")
    model.to(DEVICE, DTYPE, memory_format=torch.channels_last if CUDA else None)
    if compiled:
        model.unet.compile()
    task = EditTask(torch.rand(1, 3, model.image_size, model.image_size) * 2 - 1, "a cat")
    results = Results("imagic", f"Imagic at {count} steps", key=3)
    for way in ("all", "attention", "lora"):
        for n, m in ((2, 3), (count, 3 if SMALL else PAPER["editing"])):  # the first does not count
            peak()
            clock, method = Clock(), Imagic(Sampler(steps=m), embedding_steps=n, tuning_steps=n, tune=way)
            with closing(perform(method, model, task, clock)) as edits:
                next(edits)
        row = {"model": name, "mode": "compiled" if compiled else "eager", "tune": way}
        row |= {f"{stage}, ms a step": getattr(clock, stage) for stage in PAPER}
        row["the paper's steps, s"] = sum(getattr(clock, stage) * steps for stage, steps in PAPER.items()) / 1e3
        results.add(row | {"peak, GB": peak()})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("settings", nargs="*", help="of edit.py")
    parser.add_argument("--stages", choices=["openmoji64", "sd15"])
    parser.add_argument("--count", type=int, default=2 if SMALL else 100)
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    if options.stages:
        return stages(options.stages, options.count, options.compiled)
    results = Results("edits", "Whole edits", key=1)
    for settings in ([f"method={method}", *options.settings] for method in ("imagic", "direct_inversion", "sdedit")):
        with tempfile.TemporaryDirectory() as folder:
            runs = [edit(settings, Path(folder) / str(i)) for i in range(3)]
        results.add({"settings": " ".join(settings)} | {name: [run[name] for run in runs] for name in runs[0]})


if __name__ == "__main__":
    main()
