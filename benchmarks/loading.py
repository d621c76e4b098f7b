"""How long loading Stable Diffusion takes and how much memory, beside the plain way to do it.

    python benchmarks/loading.py [--folder DIR] [--name MACHINE] [--repeats 3]

Makes checkpoints of Stable Diffusion 1.5's true shape with random weights (19 GB in a temporary folder, inside --folder
if given), and loads each in processes of its own: as `models.load` does, and the plain
way (read the file, build the networks with random weights, copy one into the other). Into
benchmarks/results/loading-MACHINE.md go

read      the bytes of the files, read once through a buffer
load      the call itself, up to where it returns
touch     then the largest of every weight: what is mapped is read here at the latest
peak      the most memory that the process had during both, mapped pages of the file included, less what it had
          before (torch and this project imported: "before"); beside it as a share of the size of the files

"warm" files are in the page cache; "cold" ones were dropped from it (posix_fadvise), so that the disk is part of it,
though a virtual machine's host may still hold them. Warm times are the best of --repeats runs, reads of two, cold
loads are single runs, peaks the largest of all runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
RESULTS = Path(__file__).resolve().parent / "results"

CHECKPOINTS = {  # name -> the dtypes asked for, and whether the plain way is tried too
    "float32.safetensors": [("float32", True), ("float16", True), ("bfloat16", False)],
    "float16.safetensors": [("float16", True), ("float32", False)],
    "float32.ckpt": [("float32", True)],
    "float16.ckpt": [("float16", False)],
    "float32 folder": [("float32", False)],
    "float16 folder": [("float16", False)],
}


def make(folder: Path) -> None:
    """Write the checkpoints, with Stable Diffusion 1.5's sizes."""
    import stable_diffusion as sd
    import torch

    sizes = {**sd.PUBLISHED[1], "prediction": "epsilon"}
    weights = sd.make_checkpoint(sizes)
    for name in CHECKPOINTS:
        dtype = getattr(torch, re.split(r"[. ]", name)[0])
        if name.endswith("folder"):
            variant = "fp16" if dtype == torch.float16 else ""
            sd.write_folder(folder / name, weights, sizes, 1, dtype, variant=variant)
        else:
            sd.write_single_file(folder / name, weights, sizes, 1, dtype)


def load_plainly(path: Path, dtype):
    """The way that a first version would go: everything read, networks built at random, weights copied, cast."""
    import stable_diffusion as sd
    import torch
    from safetensors.torch import load_file

    from models.checkpoints import build
    from models.layouts import from_folder, from_single_file

    if path.is_dir():
        pieces, _ = from_folder({file.parent.name: load_file(file) for file in weight_files(path)})
    elif path.suffix == ".ckpt":
        pieces, _ = from_single_file(torch.load(path, weights_only=True)["state_dict"], None)
    else:
        pieces, _ = from_single_file(load_file(path), None)
    model = build(sd.PUBLISHED[1])
    for part, found in pieces.items():
        getattr(model, part).load_state_dict({name: torch.cat(tensors) for name, tensors in found.items()})
    return model.to(dtype).eval().requires_grad_(False)


def measure(path: Path, dtype_name: str, way: str) -> dict[str, float]:
    """Load once in this process: seconds and bytes."""
    import open_clip  # noqa: F401 (either way builds a text tower; importing it takes seconds and is not loading)
    import torch

    import models

    dtype = getattr(torch, dtype_name)
    before, start = resident(), time.perf_counter()
    model = models.load(path, dtype=dtype) if way == "models.load" else load_plainly(path, dtype)
    loaded = time.perf_counter()
    largest = max(p.max().item() for p in model.parameters())
    touched = time.perf_counter()
    assert largest < torch.inf and {p.dtype for p in model.parameters()} == {dtype}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"load": loaded - start, "touch": touched - loaded, "peak": peak - before, "before": before}


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def weight_files(path: Path) -> list[Path]:
    return sorted(path.glob("*/*.safetensors")) if path.is_dir() else [path]


def read_through(path: Path) -> float:
    """Seconds to read the files once."""
    buffer, start = bytearray(16 * 2**20), time.perf_counter()
    for file in weight_files(path):
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - start


def evict(path: Path) -> None:
    """Drop the files from the page cache."""
    for file in weight_files(path):
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def alone(*arguments: object) -> dict[str, float]:
    """Run this file in a process of its own, and take what it prints last."""
    command = [sys.executable, __file__, *map(str, arguments)]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return json.loads(lines[-1]) if lines else {}


def rows(path: Path, repeats: int) -> Iterator[str]:
    """The table's rows for one checkpoint."""
    size = sum(file.stat().st_size for file in weight_files(path))
    cold_read, warm_read = [], []
    for _ in range(2):
        evict(path)
        cold_read.append(read_through(path))
        warm_read.append(read_through(path))
    for dtype, both in CHECKPOINTS[path.name]:
        for way in ("models.load", "plain")[: 1 + both]:
            evict(path)
            cold = alone("measure", path, dtype, way)
            read_through(path)
            warm = [alone("measure", path, dtype, way) for _ in range(repeats)]
            best, runs = min(warm, key=lambda r: r["load"] + r["touch"]), [cold, *warm]
            peak = max(r["peak"] for r in runs)
            cells = [
                f"{path.name}, {size / 1e9:.2f} GB",
                dtype,
                way,
                f"{min(warm_read):.1f}",
                f"{best['load']:.1f} + {best['touch']:.1f}",
                f"{min(cold_read):.1f}",
                f"{cold['load']:.1f} + {cold['touch']:.1f}",
                f"{max(r['before'] for r in runs) / 1e9:.2f}",
                f"{peak / 1e9:.2f}",
                f"{peak / size:.2f}",
            ]
            yield f"| {' | '.join(cells)} |"


def main() -> None:
    if sys.argv[1:2] == ["make"]:
        return make(Path(sys.argv[2]))
    if sys.argv[1:2] == ["measure"]:
        return print(json.dumps(measure(Path(sys.argv[2]), *sys.argv[3:])))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--name", default=re.sub(r"\W+", "-", platform.processor() or platform.machine()).lower())
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        alone("make", folder)
        for name in CHECKPOINTS:
            for line in rows(Path(folder) / name, options.repeats):
                print(line, flush=True)
                lines.append(line)
    import torch

    from files import whole_file

    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    columns = "file|to|way|read, warm|load + touch, warm|read, cold|load + touch, cold|before|peak|peak / size"
    text = [
        "# Loading Stable Diffusion 1.5",
        "",
        f"{len(os.sched_getaffinity(0))} cores of an {cpu[1] if cpu else platform.machine()}, no GPU used, "
        f"torch {torch.__version__}, {time.strftime('%B %Y')}. Seconds and GB (1e9 bytes);",
        "made by `python benchmarks/loading.py`, whose head says what the columns are.",
        "",
        f"| {columns.replace('|', ' | ')} |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|",
        *lines,
    ]
    RESULTS.mkdir(exist_ok=True)
    with whole_file(RESULTS / f"loading-{options.name}.md") as partial:
        partial.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
