"""What a sweep ends with: `summary.csv`, one row for each job and edit, and `summary.png`, the edits laid out
over the swept settings; over a benchmark, what reporting/comparison.py makes of it. All is read from the jobs' own
folders, so any launcher may have run them."""

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, ListConfig, OmegaConf

from errors import InputError
from reporting.objective import check_directions, names
from reporting.outcome import explain, unquoted
from reporting.tables import unique

JOBS = "*/.hydra/overrides.yaml"  # which Hydra writes when a job begins


@dataclass
class Row:
    """One edit of one job; `picture` is None where the job failed. `overrides` are as they were typed."""

    job: str
    overrides: dict[str, str]
    settings: dict[str, float | int | str] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    picture: Path | None = None
    source: Path | None = None  # the input
    prompt: str = ""
    error: str = ""
    record: dict | None = None  # in a benchmark, the edit's row as benchmark.rows_of made it


class Summary(Callback):
    """Hydra's callback; see conf/edit.yaml. Ends the program with 1 if a job failed."""

    def __init__(self) -> None:
        self.before: dict[Path, float] = {}  # what an earlier sweep left in the same folder, and when it was written

    def on_multirun_start(self, config: DictConfig, **kwargs) -> None:
        self.before = {path: path.stat().st_mtime for path in Path(config.hydra.sweep.dir).glob(JOBS)}
        given = OmegaConf.select(config, "hydra.sweeper.direction")
        if given is None:  # a sweeper that optimises nothing
            return
        directions = given if isinstance(given, ListConfig) else [given]
        try:
            check_directions(names(config.objective), [getattr(each, "name", each) for each in directions])
        except InputError as error:  # Hydra would make a mere warning of it
            sys.exit(f"error: {error}")

    def on_multirun_end(self, config: DictConfig, **kwargs) -> None:
        folder = Path(config.hydra.sweep.dir)
        try:
            rows = read_jobs(folder, self.before)
            write_summary(folder, rows)
            compared = []
            if any(row.record for row in rows):
                from reporting.comparison import compare

                compared = compare(folder, rows)
        except Exception as error:
            line = explain(error)
            if line is None:
                raise
            sys.exit(f"error: {line}")
        jobs, failed = {row.job for row in rows}, {row.job for row in rows if row.error and not row.record}
        print(f"{len(jobs)} jobs, {len(failed)} failed; table: {folder / 'summary.csv'}")
        if compared:
            print("\n".join(compared))
        elif any(row.picture for row in rows):
            print(f"all edits: {folder / 'summary.png'}")
        if failed:
            sys.exit(1)


def read_jobs(folder: Path, before: Mapping[Path, float] | None = None) -> list[Row]:
    """The rows of every job below `folder`, in the order of their numbers, but for those that are as old as `before`
    says. (Whether one is older than the sweep cannot be asked: the clocks of a cluster's machines differ.)"""
    old = before or {}
    found = [path for path in folder.glob(JOBS) if path.stat().st_mtime != old.get(path)]
    rows = []
    for job in sorted((path.parent.parent for path in found), key=lambda job: (len(job.name), job.name)):
        typed = yaml.safe_load((job / ".hydra" / "overrides.yaml").read_text()) or []
        overrides = dict(unquoted(item).lstrip("+~").split("=", 1) for item in typed if "=" in item)
        results, whole = sorted(job.glob("*/result.json")), job / "summary.json"
        names = json.loads(whole.read_text()).get("names") if whole.exists() else None
        if names is not None:  # there may be other results, from when the list was longer
            results = [path for path in results if path.parent.name in names]
        tasks = [record for path in results for record in json.loads(path.read_text())]
        rows += [of_task(job, overrides, record) for record in tasks]
        failure, one = job / "error.txt", job / "metrics.json"
        if failure.exists() or not (tasks or one.exists()):
            told = failure.read_text().strip() if failure.exists() else "the job did not finish"
            rows.append(Row(job.name, overrides, error=" ".join(told.split())))
        elif not tasks:
            report = json.loads(one.read_text())
            for edit in report["edits"]:
                numbers = edit["metrics"] | {"reconstruction_psnr": report["reconstruction"]["psnr"]}
                picture, source = job / edit["file"], job / "input.png"
                rows.append(Row(job.name, overrides, edit["settings"], numbers, picture, source, report["prompt"]))
    return rows


def of_task(job: Path, overrides: dict[str, str], record: dict) -> Row:
    """The row for an edit of a benchmark, or for a task that failed."""
    settings = {"task": record["task"]}
    if "error" in record:
        return Row(job.name, overrides, settings, error=record["error"], record=record)
    settings |= {"sample": record["sample"], **record["settings"]}
    picture, source = job / record["file"], job / record["task"] / "input.png"
    return Row(job.name, overrides, settings, record["metrics"], picture, source, record["prompt"], record=record)


def write_summary(folder: Path, rows: list[Row]) -> None:
    """`summary.csv`, and `summary.png` where there are edits of one picture to show."""
    from files import whole_file

    axes = swept(rows)
    overrides = unique(name for row in rows for name in row.overrides)
    settings = unique(name for row in rows for name in row.settings)
    numbers = unique(name for row in rows for name in row.numbers)
    with whole_file(folder / "summary.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        edit_settings = [f"edit.{name}" for name in settings]
        writer.writerow(["job", *overrides, *edit_settings, *numbers, "file", "error"])
        for row in rows:
            cells = [row.overrides.get(name, "") for name in overrides]
            cells += [row.settings.get(name, "") for name in settings]
            cells += [row.numbers.get(name, "") for name in numbers]
            file_name = row.picture.relative_to(folder) if row.picture else ""
            writer.writerow([row.job, *cells, file_name, row.error])
    if any(row.picture for row in rows) and not any(row.record for row in rows):
        picture = lay_out(rows, axes)
        with whole_file(folder / "summary.png") as path:
            picture.save(path, format="PNG")


def by_job(rows: Sequence[Row]) -> dict[str, list[Row]]:
    jobs: dict[str, list[Row]] = {}
    for row in rows:
        jobs.setdefault(row.job, []).append(row)
    return jobs


def swept(rows: Sequence[Row]) -> list[str]:
    """The names along which the edits differ: overrides that take several values over the jobs, then settings
    of edits that take several values within a job (a list of eta, several samples)."""
    overrides = unique(name for row in rows for name in row.overrides)
    axes = [name for name in overrides if len({row.overrides.get(name) for row in rows}) > 1]
    settings = unique(name for row in rows for name in row.settings)
    for name in settings:
        values = ({row.settings[name] for row in job if name in row.settings} for job in by_job(rows).values())
        if any(len(several) > 1 for several in values):
            axes.append(f"edit.{name}")
    return axes


def value_of(row: Row, axis: str) -> str:
    from reporting.sheet import brief

    if axis.startswith("edit."):
        return brief(row.settings.get(axis.removeprefix("edit."), ""))
    return row.overrides.get(axis, "")


def shown_as(rows: Sequence[Row], axis: str) -> dict[str, str]:
    """The values of an axis, each with how it is shown: rounded, where no other becomes the same."""
    from reporting.sheet import brief

    values = unique(value_of(row, axis) for row in rows)
    rounded = [brief(value) for value in values]
    return {value: new if rounded.count(new) == 1 else value for value, new in zip(values, rounded, strict=True)}


def lay_out(rows: list[Row], axes: list[str]):
    """The axis of most values runs over the columns, every combination of the others is a row; the input first."""
    from reporting.sheet import Cell, grid, scores

    along = max(axes, key=lambda axis: len({value_of(row, axis) for row in rows}), default=None)
    across = [axis for axis in axes if axis != along]
    shown = [row for row in rows if row.picture or not (along or "").startswith("edit.")]
    lost = [row for row in rows if row not in shown]  # failed before it could say which edits it would make
    row_keys = unique(tuple(value_of(row, axis) for axis in across) for row in rows)
    columns = unique(value_of(row, along) for row in shown) if along else [str(i) for i in range(len(shown))]
    table = {key: [None] * len(columns) for key in row_keys}
    sources: dict[tuple, Path | None] = dict.fromkeys(row_keys)
    for i, row in enumerate(shown):
        key = tuple(value_of(row, axis) for axis in across)
        column = columns.index(value_of(row, along)) if along else i
        sources[key] = sources[key] or row.source
        if row.picture:
            table[key][column] = Cell(row.picture, [scores(row.numbers)])
        else:
            table[key][column] = Cell(None, [f"failed: {row.error}"])
    for row in lost:
        table[tuple(value_of(row, axis) for axis in across)][0] = Cell(None, [f"failed: {row.error}"])

    names, shown_by = [short(axis) for axis in axes], {axis: shown_as(rows, axis) for axis in axes}
    same_input = len({path.read_bytes() for path in sources.values() if path}) == 1
    body, first = [], True
    for key in row_keys:
        source = sources[key] if first or not same_input else None
        first = first and source is None
        body.append([Cell(source, ["input"]) if source else None, *table[key]])
    prompts = unique(row.prompt for row in rows if row.prompt)
    title = [f'"{prompts[0]}"' if len(prompts) == 1 else f"{len(prompts)} prompts"]
    title += [f"swept: {', '.join(names)}"] if names else []
    labels = [
        ", ".join(f"{short(a)} {shown_by[a][v]}" for a, v in zip(across, key, strict=True) if v) for key in row_keys
    ]
    heads = ["", *(f"{short(along)} {shown_by[along][value]}" if along else "" for value in columns)]
    return grid(title, body, labels if across else None, heads)


def short(axis: str) -> str:
    """method.eta -> eta: the last part names it well enough on a picture."""
    return axis.rsplit(".", 1)[-1]
