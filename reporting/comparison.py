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
from reporting.sweep import Row, by_job, short, shown_as, swept, value_of
from reporting.tables import HEADLINE, aligned, by_label, means, unique

POOLED = ("seed", "task.shard", "edit.task", "edit.sample")  # axes that make no other method or setting of an edit
PRESERVATION = ("psnr_to_input_kept", "psnr_to_input")  # the first of these that was measured
SUCCESS = ("success", "clip_score")


def compare(folder: Path, rows: Sequence[Row]) -> list[str]:
    """Write the files for the `rows` of a sweep over benchmarks; the lines to print in the end."""
    edits, labels = labelled(rows)
    found, lacking, categories = by_label(edits), missing(labels, rows), unique(edit["category"] for edit in edits)
    success = {category: f"success_{category or 'no category'}" for category in categories}
    numbers: dict[str, dict[str, float]] = {}
    for label in labels:
        group = found.get(label, {"overall": means([]), "by_category": {}})
        numbers[label] = group["overall"] | {"missing": lacking[label]}
        for category, mean in group["by_category"].items() if len(categories) > 1 else ():
            numbers[label] |= {success[category]: mean["success"]} if "success" in mean else {}
    measured = unique(name for mean in numbers.values() for name in mean)
    by_category = [name for name in success.values() if name in measured]
    with whole_file(folder / "comparison.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["edited_by", *measured])
        writer.writeheader()
        writer.writerows({"edited_by": label} | mean for label, mean in numbers.items())
    headline = [name for name in HEADLINE if name in measured]
    tables = [aligned(numbers, columns, "edited by") for columns in (headline, by_category) if columns]
    with whole_file(folder / "comparison.md") as path:
        path.write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    axes = [next((name for name in names if name in measured), "") for names in (PRESERVATION, SUCCESS)]
    points = [(label, *(mean[a] for a in axes)) for label, mean in numbers.items() if all(a in mean for a in axes)]
    written = ["comparison.csv", "comparison.md", "index.html"]
    if points:
        with whole_file(folder / "comparison.png") as path:
            plot_points(points, axes, path)
        written.append("comparison.png")
    with whole_file(folder / "summary.png") as path:
        one_of_each(folder, edits, list(labels), categories).save(path, format="PNG")
    write_page(folder / "index.html", "comparison", edits)
    return ["", "\n\n".join(tables), "", *(str(folder / name) for name in [*written, "summary.png"])]


def labelled(rows: Sequence[Row]) -> tuple[list[dict], dict[str, list[Row]]]:
    """The edits, each with a `label`, its method by name and then what else was swept ("imagic, eta 0.6"), and a
    `place`; and by label a row of each of its jobs. What failed counts for every label that its job has."""
    axes = [axis for axis in swept(rows) if axis not in ("method", *POOLED)]
    shown_by = {axis: shown_as(rows, axis) for axis in axes}
    known = {row.job: row.record["method"] for row in rows if row.record and "method" in row.record}
    sole = next(iter(known.values()), "edit")
    edits, labels = [], {}
    for job, here in by_job(rows).items():
        method = known.get(job) or here[0].overrides.get("method", sole)
        names = [
            ", ".join(
                [method, *(f"{short(axis)} {shown_by[axis][value]}" for axis in axes if (value := value_of(row, axis)))]
            )
            for row in here
        ]
        every = unique(name for name, row in zip(names, here, strict=True) if not row.error) or names[:1]
        for name, row in zip(names, here, strict=True):
            for label in (every if row.error else [name]) if row.record else []:
                edits.append(row.record | {"label": label, "place": f"{job}/"})
        for name in every:
            labels.setdefault(name, []).append(here[0])
    return edits, labels


def missing(labels: dict[str, list[Row]], rows: Sequence[Row]) -> dict[str, int]:
    """For each label how many tasks its jobs did not come to, of those that any job with the same list has."""

    def overrides(row: Row, only: str = "") -> tuple:
        found = [(n, v) for n, v in row.overrides.items() if n.startswith(only) and n != "task.shard"]
        return (only, *sorted(found))

    tasks: dict[tuple, set[str]] = {}  # of a list, and of a run, which may have been shared out
    for row in rows:
        for key in (overrides(row, "task"), overrides(row)):
            tasks.setdefault(key, set()).update([row.record["task"]] if row.record else [])
    runs = {name: {(overrides(row, "task"), overrides(row)) for row in jobs} for name, jobs in labels.items()}
    return {name: sum(len(tasks[all_of] - tasks[own]) for all_of, own in found) for name, found in runs.items()}


def one_of_each(folder: Path, edits: Sequence[dict], labels: Sequence[str], categories: Sequence[str]) -> Image.Image:
    """A row for each category: the input, what each label made of it, and the true result where it is known, of the
    task that most labels have edited."""
    body, names = [], []
    for category in categories:
        tasks: dict[tuple, dict[str, dict]] = {}
        for edit in edits:
            if edit["category"] == category and "error" not in edit:
                tasks.setdefault((edit["task"], edit["prompt"]), {}).setdefault(edit["label"], edit)
        if not tasks:
            continue
        (task, prompt), made = max(tasks.items(), key=lambda item: len(item[1]))
        place = folder / next(iter(made.values()))["place"] / task
        cells = [Cell(place / "input.png", ["input"])]
        for label in labels:
            edit = made.get(label)
            cells.append(Cell(folder / edit["place"] / edit["file"] if edit else None, [outcome(edit)]))
        if (place / "truth.png").exists():
            cells.append(Cell(place / "truth.png", ["true result"]))
        body.append(cells)
        names.append(f"{category}: {prompt}")
    return grid(["one task of each category"], body or [[None]], names, ["", *labels])


def outcome(edit: dict | None) -> str:
    """The word under an edit on the sheet."""
    if edit is None:
        return "not edited"
    success = edit["metrics"].get("success")
    return "" if success is None else "success" if success else "no success"
