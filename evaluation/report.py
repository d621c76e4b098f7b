"""Report on runs from their rows: tables, a sheet of pictures, plots and a page. A row is one edit, or one failed task.

`read` makes one DataFrame of the rows of a run, or of all jobs of a sweep. Everything else is a function of it. Edits
with one `label` (the method, and the settings in which edits differ) are averaged: over tasks, seeds and samples.
"""

import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import matplotlib
import pandas as pd
from PIL import Image

from data.images import open_rgb
from files import whole_file

FILES = {  # paths of pictures, and the numbers under them
    "input": ("input_clip_score",), "reconstruction": ("reconstruction_psnr",), "truth": ("truth_clip_score",),
    "file": ("clip_score", "psnr_to_input"),
}  # fmt: skip
TASK = ["task", "prompt", "pictures"]  # rows that agree in these edit one picture to one end
MARKS = ("task", "category", "prompt", "source_prompt", "negative_prompt", "blend_word", "pictures")
ABOUT = ("job", *TASK, "source_prompt", *FILES, "category", "method", "sample", "seed", "error")
HEADLINE = {  # the columns of tables, and their formats
    "edits": ".0f", "failed": ".0f", "success": ".0%", "attainable": ".0%", "psnr_to_truth": ".1f",
    "psnr_to_input": ".1f", "psnr_to_input_kept": ".1f", "clip_score": ".3f", "clip_similarity_to_input": ".3f",
    "structure_distance_to_input": ".3f", "lpips_to_input_kept": ".3f", "evaluations": ".0f", "seconds": ".1f",
}  # fmt: skip


def read(folder: Path) -> pd.DataFrame:
    """Read the rows of every run in or below `folder`. `job` is the run's folder, "" for `folder` itself, and files are
    relative to `folder`. A failure counts until its task has an edit. An unfinished job is a row without a task."""
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
    for path in sorted(folder.glob("rows*.jsonl")):
        for line in path.read_text("utf-8", "replace").splitlines():
            # A line that a killed process did not finish, or of another program.
            with suppress(AttributeError, RecursionError, TypeError, ValueError):
                row = json.loads(line)
                rows[task_of(row), row.get("file")] = row
    done = {task for task, file in rows if file}
    return [row for (task, file), row in rows.items() if file or task not in done]


def task_of(row: dict) -> tuple:
    """Marks by which a row's task is known again: names may be line numbers."""
    return tuple(row.get(name) or "" for name in MARKS)


def complete(rows: pd.DataFrame) -> pd.DataFrame:
    """Add the columns that a DataFrame of rows lacks."""
    rows = rows.reindex(columns=[*ABOUT, *(name for name in rows if name not in ABOUT)])
    texts = ("job", "category", "prompt", "source_prompt", "pictures")
    return rows.astype(dict.fromkeys((*texts, "method"), object)).fillna(dict.fromkeys(texts, ""))


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


def describe(row: dict, settings: Iterable[str]) -> str:
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
    """The headline as tables of texts, "20.1 ± 0.5" with a standard error: by label; of several categories, by both."""

    def text(name: str, line: dict) -> str:
        numbers = [line[key] for key in (name, f"{name}_se") if key in line]
        return " ± ".join(f"{number:{HEADLINE[name]}}" for number in numbers)

    tables, rows = [], rows.sort_values("category", kind="stable").rename(columns={"label": "edited by"})
    for by in (["edited by"], ["category", "edited by"])[: rows["category"].nunique()]:
        lines = records(means(rows, by))
        names = [name for name in HEADLINE if any(name in line for line in lines)]
        tables.append(pd.DataFrame([{n: line[n] for n in by} | {n: text(n, line) for n in names} for line in lines]))
    return tables


def markdown(table: pd.DataFrame) -> str:
    """A table of texts in Markdown, with columns of even width."""
    lines = [[name or "-" for name in table], *table.to_numpy().tolist()]
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


# Files.


def write(folder: Path, rows: pd.DataFrame, tasks: int, curves: dict | None = None) -> str:
    """Write the report on `rows` into `folder`, and return the text to print. Any run gets results.csv, sheet.png and
    plots/; several `tasks` or jobs also table.md and index.html. `curves` are losses, {stage: {name: one a step}}."""
    rows = labelled(rows)
    edited = rows["error"].isna()
    done, failed = rows["task"][edited].nunique(), rows["task"][~edited].nunique()
    counts = f"{done} of {tasks} tasks done, {failed} failed" if tasks > 1 else ""
    files = {"results.csv": rows.drop(columns="label").dropna(axis="columns", how="all").to_csv(index=False)}
    tables = [markdown(table) for table in summaries(rows)]
    if tasks > 1 or (rows["job"] != "").any():
        files["table.md"] = "\n\n".join(filter(None, [*tables, counts])) + "\n"
        files["index.html"] = page(folder.name, rows)
    with matplotlib.rc_context({"font.family": fonts(), "text.parse_math": False}):
        if edited.any():
            files["sheet.png"] = sheet(folder, rows)
        files |= plots(rows, curves or {})
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            with whole_file(folder / name) as partial:
                if isinstance(content, str):
                    partial.write_text(content, encoding="utf-8")
                else:
                    content.savefig(partial, format="png")
    return "\n".join(filter(None, [tables[0], counts, *(str(folder / name) for name in files)]))


def fonts() -> list[str]:
    """Matplotlib's own font, and those of the system for Chinese, Japanese and Korean, without which it would warn."""
    from matplotlib.font_manager import get_font_names

    asian = re.compile("CJK|Source Han Sans|WenQuanYi|PingFang|Hiragino Sans|YaHei|MS Gothic|Droid Sans Fallback")
    return ["DejaVu Sans", *sorted(filter(asian.search, get_font_names()))]


def scores(row: dict, file: str) -> str:
    """The numbers under a picture, a line for each."""
    names = {name: name.removeprefix(f"{file}_").replace("_", " ") for name in FILES[file] if name in row}
    return "\n".join(f"{words} {row[name]:.3g}" for name, words in names.items())


def page(title: str, rows: pd.DataFrame) -> str:
    """One HTML page with every task: input, edits and true result. It needs no server; a script sorts and filters."""
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
        figures["plots/loss.png"] = figure = Figure((5 * len(curves), 3.6), layout="constrained", dpi=120)
        for panel, stage in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
            losses = pd.DataFrame({name: pd.Series(curve) for name, curve in curves[stage].items()})
            smooth = losses.rolling(max(1, len(losses) // 10), min_periods=1).mean()
            smooth.plot(ax=panel, title=stage, xlabel="step", grid=True)
    axes = swept(rows)
    points = means(rows, ["label", "method"])
    x = "psnr_to_input_kept" if "psnr_to_input_kept" in points else "clip_similarity_to_input"
    y = "success" if "success" in points else "clip_score"
    if {x, y} <= set(points) and len(points := points.dropna(subset=[x, y]).sort_values(x)) > 1:
        figures["plots/tradeoff.png"] = figure = Figure((7.5, 5), layout="constrained", dpi=120)
        panel = figure.subplots()
        for method, group in points.groupby("method", sort=False):
            errors = [group.get(f"{name}_se") for name in (y, x)]
            panel.errorbar(group[x], group[y], *errors, fmt="o-" if len(axes) == 1 else "o", label=method)
        for line in records(points):
            panel.annotate(line["label"], (line[x], line[y]), (6, 4), textcoords="offset points", fontsize=8)
        panel.set(xlabel=x.replace("_", " "), ylabel=y.replace("_", " "), xmargin=0.25)
        panel.legend()
    return figures


# The sheet.


def sheet(folder: Path, rows: pd.DataFrame):
    """Draw the pictures of labelled rows: the input, the reconstruction and the true result of a task, and its edits.
    Of one task all edits stand there; of several, for the first of each category or the first eight, one of each label.
    """
    if rows["job"].nunique() > 1:  # each job has its own
        rows = rows.drop(columns="reconstruction")
    rows, title = rows.dropna(subset="task"), ", ".join(rows["method"].unique())
    tasks = rows.drop_duplicates(TASK)
    if alone := len(tasks) == 1:
        about = records(tasks)[0]
        title += f': "{about["prompt"]}"' + (f'\nfrom "{about["source_prompt"]}"' if about["source_prompt"] else "")
        axes = [name for name in ("method", *swept(rows), "seed", "sample") if rows[name].nunique() > 1]
        axes = axes or [name for name in rows if name.startswith("edit.")]
        rows = rows.assign(label=[describe(row, axes) for row in records(rows)])
    else:
        shown = tasks.drop_duplicates("category") if tasks["category"].nunique() > 1 else tasks[:8]
        rows = rows.merge(shown[TASK]).drop_duplicates([*TASK, "label"])
    lines = []  # of at most eight pictures: (heading, [(file, the words under it)])
    for _, group in rows.groupby(TASK, sort=False):
        edits = records(group)
        about = min(edits, key=lambda row: "error" in row)
        cells = [(about[file], f"{file}\n{scores(about, file)}") for file in list(FILES)[:3] if file in about]
        for row in edits:
            cells.append((row.get("file"), f"{row['label']}\n{row.get('error', '')[:160] or scores(row, 'file')}"))
        heading = "" if alone else f"{about['category']} {about['task']}: {about['prompt']}".strip()
        lines += [(heading if i == 0 else "", cells[i : i + 8]) for i in range(0, len(cells), 8)]
    return draw_sheet(folder, title, lines[:100])


def draw_sheet(folder: Path, title: str, lines: Sequence[tuple[str, Sequence[tuple[str | None, str]]]]):
    """Draw lines of pictures (a grey field for None) with words under them, and a heading above each line."""
    from matplotlib.figure import Figure

    side, columns = 2.56, max(len(cells) for _, cells in lines)  # inches, of 100 pixels
    wide = max(5, columns * (side + 0.1) + 0.1)

    def wrapped(words: str, room: float) -> str:
        return "\n".join(part for line in words.split("\n") for part in textwrap.wrap(line, int(room * 13)))

    title = wrapped(title, wide)
    lines = [(heading, [(file, wrapped(words, side)) for file, words in cells]) for heading, cells in lines]
    text = 0.6 + 0.17 * max(words.count("\n") for _, cells in lines for _, words in cells)
    top = 0.6 + 0.17 * title.count("\n")
    tall = len(lines) * (side + text) + top
    figure, right = Figure((wide, tall), dpi=100), columns * (side + 0.1) / wide
    figure.text(0.1 / wide, 1 - 0.1 / tall, title, va="top", fontsize=9)
    edges = {"left": 0.1 / wide, "right": right, "top": 1 - top / tall, "bottom": text / tall}
    grid = figure.add_gridspec(len(lines), columns, **edges, wspace=0.1 / side, hspace=text / side)
    for i, (heading, cells) in enumerate(lines):
        for j, (file, words) in enumerate(cells):
            panel = figure.add_subplot(grid[i, j], xticks=[], yticks=[], anchor="NW")
            picture = open_rgb(folder / file) if file else Image.new("RGB", (64, 64), "#dddddd")
            panel.imshow(picture, interpolation="lanczos")
            panel.spines[:].set_color("#cccccc")
            panel.set_xlabel(words, loc="left", fontsize=9)
            panel.set_title("" if j else textwrap.shorten(heading, int(wide * 13)), loc="left", fontsize=9)
    return figure
