"""Report on runs from their rows: tables, a sheet of pictures, plots and a page. A row is one edit, or one failed task.

`read` makes one DataFrame of the rows of a run, or of all jobs of a sweep. Everything else is a function of it. Edits
with one `label` (the method, and the settings in which edits differ) are averaged: over tasks, seeds and samples.
"""

import json
import math
import textwrap
from collections import defaultdict
from collections.abc import Sequence
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
    runs = [run for run in found if not found & set(run.parents)]
    table = []
    for run in sorted(runs, key=lambda run: (len(run.name), run)):
        prefix = "" if run == folder else f"{run.relative_to(folder).as_posix()}/"
        lines = [row for path in sorted(run.glob("rows*.jsonl")) for row in json_lines(path)]
        done = {row["task"] for row in lines if "error" not in row}
        lines = [row for row in lines if "error" not in row or row.get("task") not in done]
        rows = {(row.get("task"), row.get("file")): row for row in lines}  # the last attempt of each
        for row in rows.values() or [{"error": "the job did not finish"}]:
            files = {name: prefix + row[name] for name in FILES if row.get(name)}
            no_task = {} if "category" in row else {"task": None}  # the setting task= has the same name
            table.append({"job": prefix[:-1]} | row | files | no_task)
    return complete(pd.DataFrame(table))


def json_lines(path: Path) -> list[dict]:
    """The objects of a .jsonl file, but for a line that a killed process did not finish."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


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
    """Add a `label` to rows. A failed task has no settings of edits, so it counts for every label of its job."""
    rows = complete(rows)
    axes, failed = swept(rows), rows["error"].notna()
    of_job = rows.groupby("job")["method"].transform("first")
    rows["method"] = rows["method"].fillna(of_job).ffill().bfill().fillna("-")
    rows["label"] = [", ".join(filter(None, [row["method"], describe(row, axes)])) for row in records(rows)]
    labels = rows[~failed].groupby("job")["label"].unique()
    rows["label"] = rows["label"].mask(failed, rows["job"].map(labels).fillna(rows["label"]))
    return rows.explode("label", ignore_index=True)


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
        form, error = HEADLINE[name], line.get(f"{name}_se")
        value = f"{line[name]:{form}}" if name in line else ""
        exact = error is None or name in ("attainable", "evaluations", "seconds")
        return value if exact else f"{value} ± {error:{form}}"

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
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """All rows as "results", and means as "overall" and "by_category"."""
    marked, rows = labelled(rows), complete(rows).drop(columns="left_out")
    overall, by_category = means(marked, ["label"]), means(marked, ["category", "label"])
    return {"overall": overall, "by_category": by_category, "results": rows.dropna(axis="columns", how="all")}


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
    files = {"results.csv": rows.drop(columns="left_out").dropna(axis="columns", how="all").to_csv(index=False)}
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
    method's points in the order of the only setting in which they differ."""
    from matplotlib.figure import Figure

    figures = {}
    if curves:
        figures["plots/loss.png"] = figure = Figure((5 * len(curves), 3.6), layout="constrained")
        for panel, stage in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
            losses = pd.DataFrame({name: pd.Series(curve) for name, curve in curves[stage].items()})
            smooth = losses.rolling(max(1, len(losses) // 10), min_periods=1).mean()
            smooth.plot(ax=panel, title=stage, xlabel="step", grid=True)
    axes = swept(rows)
    if len(axes) == 1:
        rows = rows.sort_values(axes[0], key=lambda values: pd.to_numeric(values, errors="coerce"), kind="stable")
    points = means(rows, ["label", "method"])
    x = next((n for n in ("psnr_to_input_kept", "clip_similarity_to_input") if n in points), "psnr_to_input")
    y = "success" if "success" in points else "clip_score"
    if {x, y} <= set(points) and len(points := points.dropna(subset=[x, y])) > 1:
        figures["plots/tradeoff.png"] = figure = Figure((7.5, 5), layout="constrained")
        panel = figure.subplots()
        for method, group in points.groupby("method", sort=False):
            errors = [group.get(f"{name}_se") for name in (y, x)]
            panel.errorbar(group[x], group[y], *errors, fmt="o-" if len(axes) == 1 else "o", label=method)
        downwards = records(points.sort_values(y, ascending=False)) if len(points) <= 20 else []
        for i, line in enumerate(downwards):  # right and left by turns, so that neighbours do not overlap
            words, place = line["label"].removeprefix(f"{line['method']}, "), ((6, 4), (-6, 4))[i % 2]
            side = ("left", "right")[i % 2]
            panel.annotate(words, (line[x], line[y]), place, textcoords="offset points", ha=side, fontsize=9)
        panel.set(xlabel=x.replace("_", " "), ylabel=y.replace("_", " "))
        panel.margins(0.25, 0.1)
        panel.grid(alpha=0.3)
        panel.legend()
    return figures


# The sheet.

Cell = tuple[Path | None, str]  # a picture, or a grey field for what failed, and the words under it


def sheet(folder: Path, rows: pd.DataFrame) -> Image.Image:
    """Draw the input, the reconstruction, the true result and the edits. The edits of one picture stand over the
    settings in which they differ. Of several pictures one of each category is shown, or the first eight."""
    if rows["job"].nunique() > 1:  # each job has its own
        rows = rows.drop(columns="reconstruction")
    good = rows[rows["error"].isna()]
    single, about = len(good.drop_duplicates(TASK)) == 1, records(good)[0]
    title = ", ".join(rows["method"].unique())
    if single:
        title += f': "{about["prompt"]}"' + (f'\nfrom "{about["source_prompt"]}"' if about["source_prompt"] else "")
    rows = over_settings(rows) if single else one_of_each_category(rows)
    lines: dict[str, dict[str, dict]] = defaultdict(dict)
    for row in records(rows):
        lines[row["heading"]][row["column"]] = row

    def cell(row: dict, file: str) -> Cell:
        words = row["column"] if file == "file" else file
        if file not in row:
            return None, f"{words}\nfailed: {textwrap.shorten(row['error'], 160)}"
        return folder / row[file], f"{words}\n{scores(row, file)}"

    table = []
    for heading, line in lines.items():
        about = about if single else min(line.values(), key=lambda row: "error" in row)
        first = [cell(about, file) for file in ("input", "reconstruction", "truth") if file in about]
        edits = [cell(line[name], "file") if name in line else None for name in rows["column"].unique()]
        table.append((heading, ([None] * len(first) if single and table else first) + edits))
    return draw_sheet(title, table)


def over_settings(rows: pd.DataFrame) -> pd.DataFrame:
    """Add `heading` and `column`: the setting of most values runs along the columns. Where that grid would have many
    empty places, all settings stand in the column."""
    counts = {name: rows[name].nunique() for name in ("method", *swept(rows), "seed", "sample")}
    axes = [name for name in counts if counts[name] > 1]
    grid = axes and math.prod(counts[name] for name in axes) <= 1.5 * len(rows)
    along = [max(axes, key=counts.get)] if grid else axes or [name for name in rows if name.startswith("edit.")]
    across = [name for name in axes if name not in along]
    marks = {"heading": across, "column": along}
    return rows.assign(**{mark: [describe(row, names) for row in records(rows)] for mark, names in marks.items()})


def one_of_each_category(rows: pd.DataFrame) -> pd.DataFrame:
    """Choose the first task of most edits in each category, or the first eight tasks of the only one. Add `heading`
    and `column`: tasks over labels."""
    rows = rows.dropna(subset="task")
    best = rows.groupby(TASK)["file"].transform("count").groupby(rows["category"]).idxmax().sort_values()
    rows = rows.merge(rows.loc[best, TASK] if len(best) > 1 else rows[TASK].drop_duplicates()[:8])
    headings = [f"{row['category']} {describe(row, ['image'])} {row['task']}: {row['prompt']}" for row in records(rows)]
    return rows.assign(heading=[" ".join(heading.split()) for heading in headings], column=rows["label"])


def draw_sheet(title: str, table: Sequence[tuple[str, Sequence[Cell | None]]]) -> Image.Image:
    """Draw lines of at most eight pictures with words under them, and a heading above each line. Small pictures are
    enlarged by a whole factor, large ones reduced to 384 pixels; None is an empty place."""

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

    pictures = {cell[0]: fitted(cell[0]) for _, cells in table for cell in cells if cell and cell[0]}
    wide, high = (max(sizes) for sizes in zip(*(picture.size for picture in pictures.values()), strict=True))
    width = max(480, min(8, max(len(cells) for _, cells in table)) * (wide + 12) - 12)
    empty, failed = Image.new("RGB", (wide, 1), "white"), Image.new("RGB", (wide, high), "#dddddd")
    size = 12 + wide // 64
    parts = [text(title, width, size + 3)]
    for heading, cells in table:
        drawn = [stack([pictures.get(c[0], failed), text(c[1], wide, size)], True, 4) if c else empty for c in cells]
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
