"""Report on runs from their rows: tables, a sheet of pictures, plots and a page. A row is one edit, or one failed task.

`read` makes one DataFrame of the rows of a run, or of all jobs of a sweep. Everything else is a function of it. Edits
with one `label` (the method, and the settings in which edits differ) are averaged: over tasks, seeds and samples.
"""

import json
import math
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

import pandas as pd
from PIL import Image, ImageDraw, ImageFont, ImageOps

from files import whole_file

FILES = {  # paths of pictures, and the numbers under them
    "file": ("clip_score", "psnr_to_input"), "input": ("input_clip_score",), "truth": ("truth_clip_score",),
    "reconstruction": ("reconstruction_psnr",),
}  # fmt: skip
TASK = ["task", "prompt", "pictures"]  # rows that agree in these edit one picture to one end
MARKS = ("task", "category", "prompt", "source_prompt", "negative_prompt", "pictures")
ABOUT = (
    "job", "task", "category", "method", "sample", "seed", "prompt", "source_prompt", "pictures", *FILES, "error",
    "left_out",
)  # fmt: skip
HEADLINE = {  # the columns of tables, and their formats
    "edits": ".0f", "failed": ".0f", "success": ".0%", "attainable": ".0%", "psnr_to_truth": ".1f",
    "psnr_to_input": ".1f", "psnr_to_input_kept": ".1f", "clip_score": ".3f", "clip_similarity_to_input": ".3f",
    "structure_distance_to_input": ".3f", "lpips_to_input_kept": ".3f", "evaluations": ".0f", "seconds": ".1f",
}  # fmt: skip


def read(folder: Path) -> pd.DataFrame:
    """Read the rows of every run in or below `folder`.

    `job` is the run's folder, "" for `folder` itself, and files are relative to `folder`. A failure counts only while
    its task has no edit. A job that failed as a whole, or did not finish, is a row without a task.
    """
    found = {path.parent for path in folder.rglob("rows*.jsonl")}
    found |= {path.parent.parent for path in folder.rglob(".hydra/overrides.yaml")}
    table = []
    for run in sorted(found, key=lambda run: (len(run.name), run)):
        prefix = "" if run == folder else f"{run.relative_to(folder).as_posix()}/"
        for row in run_rows(run) or [{"error": "the job did not finish"}]:
            files = {name: prefix + row[name] for name in FILES if row.get(name)}
            no_task = {} if "category" in row else {"task": None}  # the setting task= has the same name
            table.append({"job": prefix[:-1]} | row | files | no_task)
    return complete(pd.DataFrame(table))


def run_rows(folder: Path) -> list[dict]:
    """The rows of one run, from the files of all its processes: the last attempt of each edit."""
    rows = {}
    for line in (line for path in sorted(folder.glob("rows*.jsonl")) for line in path.read_text("utf-8").splitlines()):
        with suppress(json.JSONDecodeError):  # a line that a killed process did not finish
            row = json.loads(line)
            rows[task_of(row), row.get("file")] = row
    done = {task for task, file in rows if file}
    return [row for (task, file), row in rows.items() if file or task not in done]


def task_of(row: dict) -> tuple:
    """Marks by which a row's task is known again: names may be line numbers."""
    return tuple(row.get(name) for name in MARKS)


def complete(rows: pd.DataFrame) -> pd.DataFrame:
    """Add the columns that a DataFrame of rows lacks."""
    rows = rows.reindex(columns=[*ABOUT, *(name for name in rows if name not in ABOUT)])
    texts = ("job", "category", "prompt", "source_prompt", "pictures")
    return rows.astype({name: object for name in (*texts, "method")}).fillna({name: "" for name in texts})


def records(rows: pd.DataFrame) -> list[dict]:
    """The rows as dictionaries, without the values that are missing."""
    return [{name: v for name, v in row.items() if v is not None and v == v} for row in rows.to_dict("records")]


# Labels and means.


def swept(rows: pd.DataFrame) -> list[str]:
    """The settings in which edits differ: overrides between jobs, and settings of edits within a job."""
    others = {*ABOUT, *measured(rows), "label", "image", "task.shard"}  # pictures and shards are averaged
    names = [name for name in rows if name not in others]
    in_a_job = rows.groupby("job")[names].nunique().max()
    edits = [name for name in names if name.startswith("edit.") and in_a_job[name] > 1]
    overrides = [name for name in names if not name.startswith("edit.") and in_a_job[name] <= 1]
    return [name for name in overrides if rows[name].nunique(dropna=False) > 1] + edits


def describe(row: dict, settings: Sequence[str]) -> str:
    """{"edit.eta": 0.4, ...} -> "eta 0.4, ..." for the settings that the row has."""
    return ", ".join(f"{name.rsplit('.', 1)[-1]} {short(row[name])}" for name in settings if name in row)


def short(value) -> str:
    """A setting as short as it can be: "0.30000000000000004" -> "0.3"."""
    try:
        return f"{float(value):.6g}" if "." in str(value) else str(value)
    except ValueError:
        return value


def labelled(rows: pd.DataFrame) -> pd.DataFrame:
    """Add a `label` to rows. A failed task has the method and the overrides of its job alone."""
    rows = complete(rows)
    axes = swept(rows)
    of_job = rows.groupby("job")["method"].transform("first")
    rows["method"] = rows["method"].fillna(of_job).ffill().bfill().fillna("-")
    rows["label"] = [", ".join(filter(None, [row["method"], describe(row, axes)])) for row in records(rows)]
    return rows


def measured(rows: pd.DataFrame) -> list[str]:
    """The columns that are metrics or costs."""
    return [name for name in rows if "." not in name and name not in ABOUT and rows[name].dtype.kind in "fiub"]


def means(rows: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Group labelled rows: the number of edits and of failures, and each metric's mean and standard error, NAME and
    NAME_se, over the edits that have it. The error is that of the means of tasks, since edits of one task are not
    independent; with one task it is that of the edits."""
    edited, names = rows["error"].isna(), measured(rows)
    counts = rows.assign(edits=edited, failed=~edited).groupby(by, sort=False)[["edits", "failed"]].sum()
    edits = rows[edited].groupby(by)[names]
    tasks = rows[edited].groupby([*by, "task"])[names].mean().groupby(by)
    errors = tasks.sem().fillna(edits.sem()).add_suffix("_se")
    return counts.join([edits.mean(), errors]).dropna(axis="columns", how="all").reset_index()


def summaries(rows: pd.DataFrame) -> list[pd.DataFrame]:
    """The headline as tables of texts, "20.1 ± 0.5" with a standard error: by label, and where there are several
    categories by both."""

    def text(name: str, line: dict) -> str:
        numbers = [line[key] for key in (name, f"{name}_se") if key in line]
        return " ± ".join(f"{number:{HEADLINE[name]}}" for number in numbers)

    tables, rows = [], rows.sort_values("category", kind="stable")
    for by in (["label"], ["category", "label"])[: rows["category"].nunique()]:
        table = means(rows, by)
        names = [name for name in HEADLINE if name in table]
        lines = [{name: line[name] for name in by} | {n: text(n, line) for n in names} for line in records(table)]
        tables.append(pd.DataFrame(lines).rename(columns={"label": "edited by"}))
    return tables


def markdown(table: pd.DataFrame) -> str:
    """A table of texts in Markdown, with columns of even width."""
    lines = [[name or "-" for name in table], *table.to_numpy().tolist()]
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def results(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows as a table for users, without the columns that are empty."""
    return complete(rows).drop(columns="left_out").dropna(axis="columns", how="all")


# Files.


def write(folder: Path, rows: pd.DataFrame, tasks: int, curves: dict | None = None) -> str:
    """Write the report on `rows` into `folder`, and return the text to print.

    Any run gets results.csv, sheet.png and plots/; one of several `tasks` also table.md and index.html; the jobs of a
    sweep comparison.md. `curves` are the losses of tuning, {stage: {name: one value for each step}}.
    """
    rows = complete(rows)
    marked = labelled(rows)
    edited, sweep = rows["error"].isna(), bool((rows["job"] != "").any())
    done, failed = rows["task"][edited].nunique(), rows["task"][~edited].nunique()
    counts = f"{done} of {tasks} tasks done, {failed} failed" if tasks > 1 else ""
    files = {"results.csv": results(rows).to_csv(index=False)}
    overview, *by_category = map(markdown, summaries(marked))
    if sweep or tasks > 1:
        parts = filter(None, [overview, *by_category, counts])
        files["comparison.md" if sweep else "table.md"] = "\n\n".join(parts) + "\n"
    if edited.any():
        files["sheet.png"] = sheet(folder, marked)
    if tasks > 1:
        files["index.html"] = page(folder.name, marked)
    files |= plots(marked, curves or {})
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        with whole_file(folder / name) as partial:
            if isinstance(content, str):
                partial.write_text(content, encoding="utf-8")
            elif isinstance(content, Image.Image):
                content.save(partial, "png")
            else:
                content.savefig(partial, format="png", dpi=120)
    return "\n".join(filter(None, [overview, counts, *(str(folder / name) for name in files)]))


def scores(row: dict, file: str) -> str:
    """The numbers under a picture, a line for each."""
    names = {name: name.removeprefix(f"{file}_").replace("_", " ") for name in FILES[file] if name in row}
    return "\n".join(f"{words} {row[name]:.3g}" for name, words in names.items())


def page(title: str, rows: pd.DataFrame) -> str:
    """One HTML page with every task: its input, its edits and the true result. It needs no server, and its few lines of
    script sort and filter."""
    from jinja2 import Environment

    metrics, groups = measured(rows), rows.dropna(subset="task").groupby(TASK, sort=False)
    tasks = [records(group) for _, group in groups]
    for row in (row for edits in tasks for row in edits):
        row["numbers"] = {name: float(f"{row[name]:.6g}") for name in metrics if name in row}
        row["scores"] = scores(row, "file")
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template).render(
        title=title, tasks=tasks, summaries=summaries(rows), metrics=metrics, labels=rows["label"].unique(),
        categories=rows["category"].unique(),
    )  # fmt: skip


def plots(rows: pd.DataFrame, curves: dict) -> dict:
    """Figures by file: the losses of tuning, a panel for each stage; and where edits have several labels the trade-off
    of success or CLIP score against preservation, with standard errors, as in Imagic's figure 9. A line joins a
    method's points where they differ in one setting."""
    from matplotlib.figure import Figure

    figures = {}
    if curves:
        figures["plots/loss.png"] = figure = Figure((5 * len(curves), 3.6), layout="constrained")
        for panel, stage in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
            losses = pd.DataFrame({name: pd.Series(curve) for name, curve in curves[stage].items()})
            smooth = losses.rolling(max(1, len(losses) // 10), min_periods=1).mean()
            smooth.plot(ax=panel, title=stage, xlabel="step", grid=True)
    axes = swept(rows)
    points = means(rows, ["label", "method"])
    x = "psnr_to_input_kept" if "psnr_to_input_kept" in points else "clip_similarity_to_input"
    y = "success" if "success" in points else "clip_score"
    if {x, y} <= set(points) and len(points := points.dropna(subset=[x, y]).sort_values(x)) > 1:
        figures["plots/tradeoff.png"] = figure = Figure((7.5, 5), layout="constrained")
        panel = figure.subplots()
        for method, group in points.groupby("method", sort=False):
            errors = [group.get(f"{name}_se") for name in (y, x)]
            panel.errorbar(group[x], group[y], *errors, fmt="o-" if len(axes) == 1 else "o", label=method)
        for line in records(points):
            panel.annotate(line["label"], (line[x], line[y]), (6, 4), textcoords="offset points", fontsize=8)
        panel.set(xlabel=x.replace("_", " "), ylabel=y.replace("_", " "))
        panel.margins(0.25, 0.1)
        panel.grid(alpha=0.3)
        panel.legend()
    return figures


# The sheet.

Cell = tuple[Path | None, str]  # a picture, or a grey field for what failed, and the words under it


def sheet(folder: Path, rows: pd.DataFrame) -> Image.Image:
    """Draw lines of pictures: the input, the reconstruction, the true result and the edits. The edits of one picture
    stand over the settings in which they differ; of several pictures the first of each category, or the first eight,
    have a line each."""
    if rows["job"].nunique() > 1:  # each job has its own
        rows = rows.drop(columns="reconstruction")
    good = rows[rows["error"].isna()]
    title, about = ", ".join(rows["method"].unique()), records(good)[0]
    if len(good.drop_duplicates(TASK)) == 1:
        title += f': "{about["prompt"]}"' + (f'\nfrom "{about["source_prompt"]}"' if about["source_prompt"] else "")
        rows = over_settings(rows)
    else:
        tasks = rows.dropna(subset="task").drop_duplicates(TASK)
        shown = tasks.drop_duplicates("category") if tasks["category"].nunique() > 1 else tasks[:8]
        rows = rows.merge(shown[TASK])
        words = [f"{row['category']} {row.get('image', '')} {row['task']}: {row['prompt']}" for row in records(rows)]
        rows = rows.assign(heading=[" ".join(heading.split()) for heading in words], column=rows["label"])

    def cell(row: dict, file: str) -> Cell:
        words = row["column"] if file == "file" else file
        if file not in row:
            return None, f"{words}\nfailed: {textwrap.shorten(row['error'], 160)}"
        return folder / row[file], f"{words}\n{scores(row, file)}"

    table = []
    for heading, group in rows.drop_duplicates(["heading", "column"]).groupby("heading", sort=False):
        edits = records(group)
        about = min(edits, key=lambda row: "error" in row)
        first = [cell(about, file) for file in ("input", "reconstruction", "truth") if file in about]
        table.append((heading, first + [cell(row, "file") for row in edits]))
    return draw_sheet(title, table)


def over_settings(rows: pd.DataFrame) -> pd.DataFrame:
    """Add `heading` and `column`: the setting of most values runs along the lines, the others down. Where those lines
    would be short, as after a random search, all settings stand in the column."""
    axes = [name for name in ("method", *swept(rows), "seed", "sample") if rows[name].nunique() > 1]
    along = [max(axes, key=lambda name: rows[name].nunique())] if axes else [n for n in rows if n.startswith("edit.")]
    across = [name for name in axes if name not in along]
    if across and 2 * len(rows[across].drop_duplicates()) > len(rows):
        along, across = axes, []
    marks = {"heading": across, "column": along}
    return rows.assign(**{mark: [describe(row, names) for row in records(rows)] for mark, names in marks.items()})


def draw_sheet(title: str, table: Sequence[tuple[str, Sequence[Cell]]]) -> Image.Image:
    """Draw lines of at most eight pictures with words under them, and a heading above each line. Small pictures are
    enlarged by a whole factor, large ones reduced to 384 pixels."""

    def fitted(path: Path) -> Image.Image:
        with Image.open(path) as picture:
            side = max(picture.size)
            scale = 384 / side if side > 384 else math.ceil(192 / side)
            size = [round(n * scale) for n in picture.size]
            return ImageOps.expand(picture.convert("RGB").resize(size, Image.Resampling.LANCZOS), 1, "#cccccc")

    def text(words: str, width: int, size: int) -> Image.Image:
        lines = [part for line in words.split("\n") for part in textwrap.wrap(line, int(width / size * 1.9))]
        image = Image.new("RGB", (width, len(lines) * (size + 5)), "white")
        for i, line in enumerate(lines):
            ImageDraw.Draw(image).text((0, i * (size + 5)), line, "#141414", ImageFont.load_default(size))
        return image

    pictures = {cell[0]: fitted(cell[0]) for _, cells in table for cell in cells if cell[0]}
    wide, high = (max(sizes) for sizes in zip(*(picture.size for picture in pictures.values()), strict=True))
    width = max(480, min(8, max(len(cells) for _, cells in table)) * (wide + 12) - 12)
    failed = Image.new("RGB", (wide, high), "#dddddd")
    size = 12 + wide // 64
    parts = [text(title, width, size + 3)]
    for heading, cells in table:
        drawn = [stack([pictures.get(path, failed), text(words, wide, size)], True, 4) for path, words in cells]
        strips = [stack(drawn[i : i + 8], False, 12) for i in range(0, len(drawn), 8)]
        parts.append(stack([text(heading, width, size), *strips], True, 4))
    return ImageOps.expand(stack(parts, True, 16), 16, "white")


def stack(images: Sequence[Image.Image], down: bool, gap: int) -> Image.Image:
    """Put pictures below each other, or beside each other, on white."""
    starts = list(accumulate((image.size[down] + gap for image in images), initial=0))
    across = max(image.size[not down] for image in images)
    whole = Image.new("RGB", (across, starts[-1] - gap) if down else (starts[-1] - gap, across), "white")
    for image, start in zip(images, starts, strict=False):
        whole.paste(image, (0, start) if down else (start, 0))
    return whole
