"""What a sweep over a benchmark ends with: every method and setting beside the others.

`comparison.csv` and `comparison.md` have a row for each, `comparison.png` a point for each, preservation against
success, `index.html` every task with all its edits, and `summary.png` one task of each category. The seeds and the
shards of a sweep are taken together.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from files import whole_file
from reporting.page import write_page
from reporting.plots import plot_points
from reporting.sheet import Cell, grid
from reporting.sweep import Row, short, swept, unique, value_of
from reporting.tables import HEADLINE, aligned, means, show

POOLED = ("seed", "task.shard", "edit.task", "edit.sample")  # axes that make no other method or setting of an edit
PRESERVATION = ("psnr_to_input_kept", "psnr_to_input")  # the first of these that was measured
SUCCESS = ("success", "clip_score")


def compare(folder: Path, rows: Sequence[Row]) -> list[str]:
    """Write the files for those `rows` that are of a benchmark; the lines to print in the end."""
    axes = [axis for axis in swept(list(rows)) if axis not in POOLED]
    edits = [row.record | {"label": label_of(row, axes), "place": f"{row.job}/"} for row in rows if row.record]
    labels, categories = unique(edit["label"] for edit in edits), unique(edit["category"] for edit in edits)
    numbers: dict[str, dict[str, float]] = {}
    for label in labels:
        group = [edit for edit in edits if edit["label"] == label]
        numbers[label] = {"failed": sum("error" in edit for edit in group), **means(group)}
        for category in categories if len(categories) > 1 else []:
            mean = means([edit for edit in group if edit["category"] == category])
            numbers[label] |= {f"success_{category}": mean["success"]} if "success" in mean else {}
    measured = unique(name for mean in numbers.values() for name in mean)
    with whole_file(folder / "comparison.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["edited_by", *measured])
        writer.writeheader()
        writer.writerows({"edited_by": label} | mean for label, mean in numbers.items())
    by_category = [name for name in measured if name.startswith("success_")]
    tables = [table(numbers, ["edits", "failed", *(name for name in HEADLINE if name in measured)])]
    tables += [table(numbers, by_category)] if by_category else []
    with whole_file(folder / "comparison.md") as path:
        path.write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    axes = [next((name for name in names if name in measured), "") for names in (PRESERVATION, SUCCESS)]
    points = [(label, *(mean[a] for a in axes)) for label, mean in numbers.items() if all(a in mean for a in axes)]
    written = ["comparison.csv", "index.html"]
    if points:
        with whole_file(folder / "comparison.png") as path:
            plot_points(points, axes, path)
        written.append("comparison.png")
    with whole_file(folder / "summary.png") as path:
        one_of_each(folder, edits, labels, categories).save(path, format="PNG")
    write_page(folder / "index.html", "comparison", edits)
    return ["", "\n\n".join(tables), "", *(str(folder / name) for name in [*written, "summary.png"])]


def table(numbers: dict[str, dict[str, float]], columns: Sequence[str]) -> str:
    """Some of the numbers, a row for each label."""
    cells = [[label, *(show(name, mean.get(name)) for name in columns)] for label, mean in numbers.items()]
    return aligned([["edited by", *columns], *cells])


def label_of(row: Row, axes: Sequence[str]) -> str:
    """The method by its name, then what else was swept: "imagic, eta 0.6"."""
    values = [(axis, value_of(row, axis)) for axis in sorted(axes, key=lambda axis: axis != "method")]
    told = [value if axis == "method" else f"{short(axis)} {value}" for axis, value in values if value]
    return ", ".join(told) or row.overrides.get("method", "edit")


def one_of_each(folder: Path, edits: Sequence[dict], labels: Sequence[str], categories: Sequence[str]) -> Image.Image:
    """A row for each category: the input, what each label made of it, and the true result where it is known, of the
    task that most labels have edited."""
    body, names = [], []
    for category in categories:
        tasks: dict[str, dict[str, dict]] = {}
        for edit in edits:
            if edit["category"] == category and "error" not in edit:
                tasks.setdefault(edit["task"], {}).setdefault(edit["label"], edit)
        if not tasks:
            continue
        task, made = max(tasks.items(), key=lambda item: len(item[1]))
        place = folder / next(iter(made.values()))["place"] / task
        cells = [Cell(Image.open(place / "input.png"), ["input"])]
        for label in labels:
            edit = made.get(label)
            picture = Image.open(folder / edit["place"] / edit["file"]) if edit else None
            cells.append(Cell(picture, [outcome(edit)]))
        if (place / "truth.png").exists():
            cells.append(Cell(Image.open(place / "truth.png"), ["true result"]))
        body.append(cells)
        names.append(f"{category}: {next(iter(made.values()))['prompt']}")
    return grid(["one task of each category"], body or [[None]], names, ["", *labels])


def outcome(edit: dict | None) -> str:
    """The word under an edit on the sheet."""
    if edit is None:
        return "failed"
    success = edit["metrics"].get("success")
    return "" if success is None else "success" if success else "no success"
