"""Write the table "published / reproduced" of pie_bench.sh: python -m benchmarks.pie_bench PIE-Bench_v1 OUT

PSNR, MSE and SSIM are of whole pictures, the edited part black in both, as in PIE-Bench's own evaluation.
"""

import json
import re
import sys
from pathlib import Path

import pandas as pd

from benchmarks.writing import table
from data.benchmarks import PieBench
from data.images import open_rgb, to_tensor
from evaluation.metrics import black_but, mse, psnr, ssim

PRESETS = Path(__file__).resolve().parent.parent / "conf" / "experiment" / "pie"
SCALES = {"structure": 1e3, "PSNR": 1, "LPIPS": 1e3, "MSE": 1e4, "SSIM": 100, "CLIP whole": 100, "CLIP edited": 100}
STORED = ("structure_distance_to_input", "lpips_to_input_kept", "clip_score", "clip_score_edited")


def reproduced(folder: Path, tasks: PieBench) -> pd.DataFrame:
    entries, numbers = {entry.name: entry for entry in tasks.entries}, {}  # one line for each task that is done
    for line in (line for file in folder.glob("rows*.jsonl") for line in file.read_text().splitlines()):
        row = json.loads(line)
        if "error" not in row:
            edit, source = (to_tensor(open_rgb(folder / row[name])) for name in ("file", "input"))
            outside = tasks.load(entries[row["task"]], edit.shape[-1]).mask < 0.5
            pair = black_but(edit, outside), black_but(source, outside)
            structure, lpips, whole, edited = (row.get(name) for name in STORED)
            numbers[row["task"]] = [structure, psnr(*pair), lpips, mse(*pair), ssim(*pair), whole, edited]
    return pd.DataFrame(numbers.values(), columns=list(SCALES), dtype=float) * list(SCALES.values())


def main(folder: str, out: Path) -> None:
    tasks, lines = PieBench(folder), []
    for preset in sorted(PRESETS.glob("*.yaml")):
        published = re.search("# published: (.*)", preset.read_text())[1].split(", ")  # in its comment
        ours = reproduced(out / preset.stem, tasks)
        means = ("-" if mean != mean else f"{mean:.2f}" for mean in ours.mean())
        cells = (f"{text.split()[-1]} / {mean}" for text, mean in zip(published, means, strict=True))
        lines.append([preset.stem, len(ours), *cells])
    (out / "table.md").write_text(table(["published / reproduced", "edits", *SCALES], lines))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
