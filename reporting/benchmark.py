"""Many tasks with one method: each in a folder of its own, and over all of them `results.csv`, `summary.json`,
`table.md`, the page `index.html` and W&B tables.

All that is known of a run is read back from its folders. So an interrupted run goes on, several processes can share
the tasks of one folder, and the last of them to finish reports on all.
"""

import csv
import hashlib
import itertools
import json
import math
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from tqdm import tqdm

from data.tasks import Entry, Tasks
from errors import InputError
from files import whole_file
from reporting.cache import code_fingerprint
from reporting.logger import WandbLogger
from reporting.outcome import explain
from reporting.page import write_page
from reporting.sheet import describe
from reporting.tables import HEADLINE, aligned, by_label, never_measured, unique

RESULT = "result.json"  # in a task's folder, written last: a list with an object for each edit, or one with its error
SAME_ERRORS = 3  # in a row end the run: what fails like this is not the single task
NOT_COMPARED = ("logger", "cache", "device", "objective", "image", "prompt", "source_prompt", "example")  # of settings
ALIKE = {"code", "model.weights"}  # nor these: a change of the code is warned of, weights are compared by their hash
CHOICE = ("categories", "limit", "shard")  # of a task's settings: which are edited, not how


def edit_all(
    source: Tasks,
    folder: Path,
    settings: dict,
    seed: int,
    edit: Callable[[Entry, Path, int], object],
    logger: WandbLogger | None = None,
) -> dict:
    """Edit this process's share of the tasks that are not done yet, by `edit(entry, place, seed)`, which writes what
    `RunReporter` does into `place`, and report on the whole folder. Returns the summary.

    A task that fails is recorded, and tried again by the next run, after those never tried. Raises InputError where
    the folder holds results of other settings, where several tasks in a row fail with the same error, and where all
    failed.
    """
    claim(folder, settings)
    waiting = [entry for entry in source.share if not is_done(folder / entry.name, entry)]
    waiting.sort(key=lambda entry: bool(read_rows(folder / entry.name, entry)))
    done, failed, same, last = len(source.share) - len(waiting), 0, 0, ""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    bar = tqdm(
        total=len(source.share), initial=done, desc="tasks", mininterval=interval, dynamic_ncols=True, file=sys.stderr
    )
    try:
        for entry in waiting:
            error = attempt(entry, folder / entry.name, task_seed(seed, entry.name), edit)
            bar.update()
            if error:
                failed += 1
                same, last = same + 1 if error == last else 1, error
                bar.set_postfix(failed=failed)
                bar.write(f"{entry.name} failed: {error}", file=sys.stderr)
            else:
                same = 0
            if same == SAME_ERRORS:
                raise InputError(f"{same} tasks in a row failed alike, so the rest is left: {error}")
    finally:
        bar.close()
        summary = report(folder, source.entries)
        if logger is not None:
            log(logger, folder, source.entries, summary)
        mine = all(is_done(folder / entry.name, entry) for entry in source.share)
        print(told(folder, summary, goes_on=not mine))
    if not summary["waiting"] and summary["failed"] == summary["tasks"]:
        raise InputError(f"all {summary['tasks']} tasks failed: see {folder / 'results.csv'}")
    return summary


def attempt(entry: Entry, place: Path, seed: int, edit: Callable[[Entry, Path, int], object]) -> str:
    """Edit one task and write its result; the error in one line, "" without. error.txt has all of it."""
    (place / RESULT).unlink(missing_ok=True)
    (place / "error.txt").unlink(missing_ok=True)
    line = ""
    try:
        edit(entry, place, seed)
        rows = rows_of(entry, place, seed)
    except Exception as error:
        line = explain(error) or " ".join(f"{type(error).__name__}: {error}".split())
        place.mkdir(parents=True, exist_ok=True)
        (place / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        rows = [{"task": entry.name, **asked(entry), "seed": seed, "error": line}]
    with whole_file(place / RESULT) as path:
        path.write_text(json.dumps(rows, indent=1) + "\n")
    return line


def asked(entry: Entry) -> dict:
    """What a row says of its task, by which a later run knows it again."""
    pictures = [path and str(path) for path in (entry.image, entry.mask, entry.truth)]
    return {name: getattr(entry, name) for name in ("category", "prompt", "source_prompt")} | {"pictures": pictures}


def rows_of(entry: Entry, place: Path, seed: int) -> list[dict]:
    """What `RunReporter` wrote into `place`, an object for each edit. A number that is not finite is left out."""
    report, timings = (json.loads((place / f"{name}.json").read_text()) for name in ("metrics", "timings"))
    whole = {"reconstruction_psnr": report["reconstruction"]["psnr"], **timings["cost"]}
    rows = []
    for edit, left_out in zip(report["edits"], report["left_out"], strict=True):
        metrics = {**edit["metrics"], **whole}
        row = {
            "task": entry.name,
            **asked(entry),
            "sample": edit["settings"].get("sample", 0),
            "seed": seed,
            "method": report["method"],
            "settings": {name: value for name, value in edit["settings"].items() if name != "sample"},
            "metrics": {name: value for name, value in metrics.items() if math.isfinite(value)},
            "left_out": left_out | {n: f"it was {v}" for n, v in metrics.items() if not math.isfinite(v)},
            "file": f"{entry.name}/{edit['file']}",
        }
        rows.append(row)
    return rows


def task_seed(seed: int, name: str) -> int:
    """The seed of a task, which depends on nothing but the run's and its name; `seed=` edits that picture alike."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big") >> 1


def claim(folder: Path, settings: dict) -> None:
    """Write down what the folder's results are made with, or compare: InputError where it is something else, a warning
    where only the code is."""
    path = folder / "settings.json"
    ours = {name: value for name, value in settings.items() if name not in NOT_COMPARED}
    ours["task"] = {name: value for name, value in settings.get("task", {}).items() if name not in CHOICE}
    ours = flat(json.loads(json.dumps(ours | {"code": code_fingerprint()})))
    if path.exists() and any(folder.glob(f"*/{RESULT}")):
        theirs = json.loads(path.read_text())
        names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name) and name not in ALIKE]
        if not names and theirs.get("code") != ours["code"]:
            warnings.warn(f"the code has changed since {folder} was begun: its results are of both", stacklevel=2)
        elif names:
            changes = [f"{name} was {theirs.get(name)}, is {ours.get(name)}" for name in names]
            more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
            raise InputError(
                f"{folder} holds results of other settings ({'; '.join(changes[:3])}{more}): choose another "
                "hydra.run.dir, or remove it"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(json.dumps(ours, indent=1) + "\n")


def flat(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    items = {}
    for name, value in tree.items():
        items |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return items


def is_done(place: Path, entry: Entry) -> bool:
    rows = read_rows(place, entry)
    return bool(rows) and not any("error" in row for row in rows)


def read_rows(place: Path, entry: Entry | None = None) -> list[dict]:
    """The rows of a task's folder; none where it is not finished, or was another task, of the same name, than `entry`:
    lists are changed, and names may be line numbers."""
    try:
        rows = json.loads((place / RESULT).read_text())
    except FileNotFoundError:
        return []
    wanted = asked(entry) if entry else {}
    return [row for row in rows if all(row.get(name, value) == value for name, value in wanted.items())]


# ------------------------------------------------------------------------------------------------- over all


def report(folder: Path, entries: Sequence[Entry]) -> dict:
    """Write the files over all tasks, and return the summary. Where other processes finished tasks meanwhile they are
    written again: once while tasks are waiting, and until nothing changes when none is, so that whoever writes last
    has read everything. `names` in the summary are those of the tasks."""
    rows = read_all(folder, entries)
    for written in itertools.count(1):
        summary = summarise(rows, len(entries)) | {"names": [entry.name for entry in entries]}
        table = "\n\n".join(table_of(group) for group in summary["edits"]) + "\n"
        if summary["waiting"]:
            table += f"\n{summary['waiting']} of {summary['tasks']} tasks are waiting.\n"
        with whole_file(folder / "results.csv") as path:
            write_csv(path, rows)
        for name, text in (("summary.json", json.dumps(summary, indent=1) + "\n"), ("table.md", table)):
            with whole_file(folder / name) as path:
                path.write_text(text, encoding="utf-8")
        write_page(folder / "index.html", folder.name, labelled(rows))
        before, rows = rows, read_all(folder, entries)
        if rows == before or (written > 1 and len({row["task"] for row in rows}) < len(entries)):
            return summary


def read_all(folder: Path, entries: Sequence[Entry]) -> list[dict]:
    return [row for entry in entries for row in read_rows(folder / entry.name, entry)]


def labelled(rows: Sequence[dict]) -> list[dict]:
    """The rows with a `label`, what made the edit, for the page: the method, and its settings where the edits differ in
    them. A failed task has a row for each label."""
    method = next((row["method"] for row in rows if "method" in row), "")
    kinds = unique(describe(row["settings"]) for row in rows if "settings" in row)
    labels = {kind: f"{method}, {kind}" if kind and len(kinds) > 1 else method for kind in kinds or [""]}
    return [
        row | {"label": label, "place": ""}
        for row in rows
        for kind, label in labels.items()
        if "error" in row or describe(row["settings"]) == kind
    ]


def log(logger: WandbLogger, folder: Path, entries: Sequence[Entry], summary: dict) -> None:
    """The table by category, every edit with its pictures, and the means over all as the run's own numbers."""
    tables = [
        {"category": category, **group["settings"], **numbers}
        for group in summary["edits"]
        for category, numbers in {**group["by_category"], "all": group["overall"]}.items()
    ]
    logger.table("by_category", tables)
    lines = []
    for row in read_all(folder, entries):
        pictures = {name: folder / row["task"] / f"{name}.png" for name in ("input", "truth")}
        pictures["edit"] = folder / row.get("file", "")
        known = {name: path for name, path in pictures.items() if path.is_file()}
        about = {name: row[name] for name in ("task", "category", "prompt", "source_prompt", "error") if name in row}
        lines.append(about | known | row.get("settings", {}) | row.get("metrics", {}))
    logger.table("results", lines)
    for group in summary["edits"]:
        prefix = describe(group["settings"]) + "/" if len(summary["edits"]) > 1 else ""
        logger.summary({prefix + name: value for name, value in group["overall"].items()})


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    """A line for each row; settings and metrics in columns of their own names."""
    lines = [{**row, **row.get("settings", {}), **row.get("metrics", {})} for row in rows]
    settings, metrics = (unique(name for row in rows for name in row.get(part, {})) for part in ("settings", "metrics"))
    made = ["task", "category", "method", "sample", *settings, *metrics]
    columns = [*made, "file", "prompt", "source_prompt", "seed", "error"]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(lines)


def summarise(rows: Sequence[dict], tasks: int) -> dict:
    """How many tasks are done, have failed and are waiting, and for each of the settings that the edits of one task
    differ in, the means of all numbers, over all and by category. A mean is over the edits that have the number."""
    finished = [row for row in rows if "error" not in row]
    broken = [row for row in rows if "error" in row]
    done, failed = ({row["task"] for row in some} for some in (finished, broken))
    kinds = unique(json.dumps(row["settings"]) for row in finished)
    groups = [row | {"label": json.dumps(row["settings"])} for row in finished]
    groups += [row | {"label": kind} for row in broken for kind in kinds]
    edits = [{"settings": json.loads(kind), **numbers} for kind, numbers in by_label(groups).items()]
    waiting = tasks - len(done) - len(failed)
    counts = {"tasks": tasks, "done": len(done), "failed": len(failed), "waiting": waiting}
    return counts | {"edits": edits, "left_out": never_measured(rows)}


def table_of(group: dict) -> str:
    """The headline numbers by category as a Markdown table, aligned to be read as text too."""
    rows = {name or "-": numbers for name, numbers in group["by_category"].items()} | {"all": group["overall"]}
    table = aligned(rows, [name for name in HEADLINE if name in group["overall"]], "category")
    return "\n".join([f"{describe(group['settings'])}\n"] * bool(group["settings"]) + [table])


def told(folder: Path, summary: dict, goes_on: bool) -> str:
    """What a person wants to read in the end. `goes_on`: whether the same command has something left to do."""
    lines = []
    if not summary["waiting"]:
        lines = [table_of(group) + "\n" for group in summary["edits"]]
    done = f"{summary['done']} of {summary['tasks']} tasks done, {summary['failed']} failed"
    lines.append(f"{done}: {folder / 'results.csv'}")
    if goes_on:
        sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
        place = f"hydra.sweep.dir={HydraConfig.get().sweep.dir}" if sweep else f"hydra.run.dir={folder}"
        lines.append(f"the same command goes on from here with {place}")
    return "\n".join(lines)
