"""Report on runs from their rows: tables, a sheet of pictures, plots and a page. A row is one edit, or one failed task.

`read` makes one DataFrame of the rows of a run, or of all jobs of a sweep. Everything else is a function of it. Edits
with one `label` (the method, and the settings in which edits differ) are averaged: over tasks, seeds and samples.
"""

import json
import math
import textwrap
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FILES = ("file", "input", "reconstruction", "truth")  # paths of pictures
ABOUT = ("job", "task", "category", "method", "sample", "seed", "prompt", "source_prompt", *FILES, "error", "left_out")
TASK = ("task", "prompt", "image")  # rows that agree in these edit one picture to one end
AVERAGED = ("image", "task.shard")  # settings that make no other label
HEADLINE = (  # the columns of tables
    "edits", "failed", "success", "attainable", "psnr_to_truth", "psnr_to_input", "psnr_to_input_kept",
    "clip_score", "clip_similarity_to_input", "structure_distance_to_input", "lpips_to_input_kept", "evaluations",
    "seconds",
)  # fmt: skip
WHOLE = ("edits", "failed", "evaluations", "seed", "sample")
SCORES = {  # words for the numbers under a picture; of an edit the first two that it has
    "clip_score": "CLIP", "clip_similarity_to_input": "similarity", "psnr_to_input": "PSNR to input",
    "input_clip_score": "CLIP", "truth_clip_score": "CLIP", "reconstruction_psnr": "PSNR",
}  # fmt: skip


def read(folder: Path, skip: Collection[Path] = ()):
    """Read the rows of every run below `folder`, but for the runs in `skip`, as a DataFrame.

    `job` is the run's folder, "" for `folder` itself, and files are relative to `folder`. A failure counts only while
    its task has no edit. A job that failed as a whole, or did not finish, is a row without a task.
    """
    import pandas as pd

    found = {path.parent for path in folder.rglob("rows*.jsonl")}
    found |= {path.parent.parent for path in folder.rglob(".hydra/overrides.yaml")}
    runs = [run for run in found if not found & set(run.parents) and run not in skip]
    table = []
    for run in sorted(runs, key=lambda run: (len(run.name), run)):
        prefix = "" if run == folder else f"{run.relative_to(folder).as_posix()}/"
        lines = [row for path in sorted(run.glob("rows*.jsonl")) for row in json_lines(path)]
        done = {row["task"] for row in lines if "error" not in row}
        lines = [row for row in lines if "error" not in row or row.get("task") not in done]
        rows = {(row.get("task"), row.get("file")): row for row in lines}  # the last attempt of each
        for row in rows.values() or [{"error": "the job did not finish"}]:
            files = {name: prefix + row[name] for name in FILES if row.get(name)}
            no_task = {} if "category" in row else {"task": None}
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


def complete(rows):
    """Add the columns that a DataFrame of rows lacks."""
    rows = rows.reindex(columns=[*ABOUT, *(name for name in rows if name not in ABOUT)])
    texts = ("job", "category", "prompt", "source_prompt")
    return rows.astype({name: object for name in texts}).fillna({name: "" for name in texts})


def records(rows) -> list[dict]:
    """The rows as dictionaries, without the values that are missing."""
    return [{name: v for name, v in row.items() if v is not None and v == v} for row in rows.to_dict("records")]


# Labels and means.


def swept(rows) -> list[str]:
    """The settings in which edits differ: overrides between jobs, and settings of edits within a job."""
    names = [name for name in rows if "." in name or name not in (*ABOUT, "label", *measured(rows))]
    in_a_job = rows.groupby("job")[names].nunique().max() if len(rows) else {}
    edits = [name for name in names if name.startswith("edit.") and in_a_job[name] > 1]
    overrides = [name for name in names if not name.startswith("edit.") and in_a_job[name] <= 1]
    return [name for name in overrides if rows[name].nunique(dropna=False) > 1] + edits


def describe(row: dict, settings: Sequence[str]) -> str:
    """{"edit.eta": 0.4, ...} -> "eta 0.4, ..." for the settings that the row has."""
    return ", ".join(f"{name.rsplit('.', 1)[-1]} {show(name, row[name])}" for name in settings if name in row)


def labelled(rows):
    """Add a `label` to rows. A failed task has no settings of edits, so it counts for every label of its job."""
    rows = complete(rows)
    axes = [name for name in swept(rows) if name not in AVERAGED]
    rows["method"] = rows["method"].fillna(rows.groupby("job")["method"].transform("first"))
    methods = rows["method"].dropna().unique()
    rows["method"] = rows["method"].fillna(methods[0] if len(methods) == 1 else "job " + rows["job"])
    rows["label"] = [", ".join(filter(None, [row["method"], describe(row, axes)])) for row in records(rows)]
    of_job = rows[rows["error"].isna()].groupby("job")["label"].unique()
    failed = zip(rows["job"], rows["label"], rows["error"].notna(), strict=True)
    rows["label"] = [list(of_job.get(job, [label])) if error else [label] for job, label, error in failed]
    return rows.explode("label", ignore_index=True)


def measured(rows) -> list[str]:
    """The columns that are metrics or costs."""
    return [name for name in rows if "." not in name and name not in ABOUT and rows[name].dtype.kind in "fiub"]


def means(rows, by: list[str]):
    """Group labelled rows: the number of edits and of failures, and each metric's mean and standard error, NAME and
    NAME_se, over the edits that have it.

    The standard error is that of the means of tasks, since edits of one task are not independent; with one task it is
    that of the edits.
    """
    import pandas as pd

    lines = []
    for key, group in rows.groupby(by, sort=False):
        edits = group[group["error"].isna()]
        line = dict(zip(by, key, strict=True)) | {"edits": len(edits), "failed": len(group) - len(edits)}
        for name in measured(rows):
            values = edits[name].dropna()
            tasks = values.groupby(edits["task"]).mean()
            line |= {name: values.mean(), f"{name}_se": (tasks if len(tasks) > 1 else values).sem()}
        lines.append(line)
    return pd.DataFrame(lines).dropna(axis="columns", how="all")


def left_out(rows) -> list[str]:
    """A line for each reason why edits lack metrics, with the number of edits and the metrics' names."""
    counts, edits = defaultdict(lambda: defaultdict(int)), rows[rows["error"].isna()]
    for reasons in edits["left_out"].dropna():
        for name, reason in reasons.items():
            counts[reason][name] += 1
    return [
        f"no number for {n} of {len(edits)} edits ({reason}): {', '.join(m for m in names if names[m] == n)}"
        for reason, names in counts.items()
        for n in sorted(set(names.values()), reverse=True)
    ]


# Text.


def show(name: str, value, error: float = math.nan) -> str:
    """Format a value for tables, sheets and the page, with its standard error where there is one: shares in per cent,
    decibels and seconds with one decimal place, other metrics with three. Settings are as short as they can be."""
    if value is None or value != value:
        return ""
    if isinstance(value, str) or "." in name:
        try:
            return f"{float(value):.6g}"
        except ValueError:
            return value
    share, whole = name.startswith(("success", "attainable")), name in WHOLE
    form = ".0%" if share else ".0f" if whole else ".1f" if "psnr" in name or name == "seconds" else ".3f"
    exact = whole or name in ("seconds", "attainable") or error != error
    return f"{value:{form}}" if exact else f"{value:{form}} ± {error:{form}}"


def summaries(rows) -> list:
    """Tables of texts. One label: means by category. Several: means by label, and success by label and category."""
    import pandas as pd

    overall, categories = means(rows, ["label"]), means(rows, ["label", "category"])
    kinds = list(dict.fromkeys(rows["category"]))

    def texts(table, names: str, title: str):
        columns = [name for name in HEADLINE if name in table]
        return pd.DataFrame(
            {title: line.get(names) or "-"} | {c: show(c, line.get(c), line.get(f"{c}_se", math.nan)) for c in columns}
            for line in records(table)
        )

    if len(overall) == 1 and len(kinds) > 1:
        return [texts(pd.concat([categories, overall.assign(category="all")]), "category", "category")]
    tables = [texts(overall, "label", "edited by")]
    if len(kinds) > 1 and "success" in categories:
        lines = {label: dict.fromkeys(kinds, "") for label in overall["label"]}
        for line in records(categories):
            cell = show("success", line.get("success"), line.get("success_se", math.nan))
            lines[line["label"]][line["category"]] = cell
        tables.append(pd.DataFrame({"success in": label} | line for label, line in lines.items()))
    return tables


def markdown(table) -> str:
    """A table of texts in Markdown, with columns of even width."""
    lines = [[name or "-" for name in table], *table.to_numpy().tolist()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


# Files.


def tables(rows) -> dict:
    """DataFrames for W&B: all rows as "results", and means as "overall" and "by_category"."""
    marked = labelled(rows)
    groups = {"overall": means(marked, ["label"]), "by_category": means(marked, ["label", "category"])}
    return groups | {"results": complete(rows).drop(columns="left_out").dropna(axis="columns", how="all")}


def write(folder: Path, rows, tasks: int, curves: dict | None = None) -> str:
    """Write the report on `rows` into `folder`, and return the text to print.

    Any run gets results.csv, sheet.png and plots/; one of several `tasks` also table.md and index.html; the jobs of a
    sweep comparison.md. `curves` are the losses of tuning, {stage: {name: one value for each step}}.
    """
    rows = complete(rows)
    marked = labelled(rows)
    edited, sweep = rows["error"].isna(), bool((rows["job"] != "").any())
    done = set(rows["task"][edited])
    failed = set(rows["task"][~edited].dropna()) - done
    columns = [*ABOUT[not sweep : 6], *(name for name in rows if name not in ABOUT), *ABOUT[6:-1]]
    rows[columns].dropna(axis="columns", how="all").to_csv(folder / "results.csv", index=False)
    files = ["results.csv"]
    text = "\n\n".join(map(markdown, summaries(marked))) if len(rows) else ""
    if sweep or tasks > 1:
        notes = left_out(rows)
        if waiting := tasks - len(done | failed):
            notes.append(f"{waiting} of {tasks} tasks are waiting.")
        files.append("comparison.md" if sweep else "table.md")
        (folder / files[-1]).write_text("\n\n".join([text, *notes]) + "\n", encoding="utf-8")
    if edited.any():
        sheet(folder, marked).save(folder / "sheet.png")
        files.append("sheet.png")
    if tasks > 1:
        (folder / "index.html").write_text(page(folder.name, marked), encoding="utf-8")
        files.append("index.html")
    files += plot(folder / "plots", marked, curves or {})
    counts = f"{len(done)} of {tasks} tasks done, {len(failed)} failed"
    return "\n".join(filter(None, [text, counts if tasks > 1 else "", *(str(folder / name) for name in files)]))


# The sheet.

Cell = tuple[Path | None, str]  # a picture, or a grey field for what failed, and the words under it


def sheet(folder: Path, rows) -> Image.Image:
    """The input, the reconstruction, the true result and the edits.

    The edits of one picture stand over the settings in which they differ, the one of most values along the columns. Of
    several pictures one of each category is shown, or the first eight, with the edits by label.
    """
    good = records(rows[rows["error"].isna()])
    single = len({tuple(row.get(name) for name in TASK) for row in good}) == 1
    axes = [name for name in ("method", *swept(rows), "seed", "sample") if rows[name].nunique() > 1]
    along = max(axes, key=lambda name: rows[name].nunique(), default="sample")
    across = [name for name in axes if name != along]
    lines: dict[tuple[str, str], dict[str, dict]] = {}  # (category, heading) -> column -> row
    for row in records(rows if single else rows.dropna(subset="task")):
        heading = describe(row, across) if single else f"{row['category']} {row['task']}: {row['prompt']}".strip()
        column = describe(row, [along]) if single else row["label"]
        lines.setdefault(("" if single else row["category"], heading), {}).setdefault(column, row)
    columns = list(dict.fromkeys(column for cells in lines.values() for column in cells))
    one_job = rows["job"].nunique() == 1

    def references(row: dict) -> list[Cell]:
        words = {"input": "input_clip_score", "reconstruction": "reconstruction_psnr", "truth": "truth_clip_score"}
        names = [name for name in words if name in row and (one_job or name != "reconstruction")]
        return [(folder / row[name], f"{name}\n{scores(row, [words[name]])}") for name in names]

    def edits(cells: dict[str, dict]) -> list[Cell | None]:
        return [edit_cell(folder, cells[name], name) if name in cells else None for name in columns]

    if not single:
        most_edits_first = sorted(lines, key=lambda line: -sum("file" in row for row in lines[line].values()))
        categories = {category: (category, heading) for category, heading in reversed(most_edits_first)}
        table = []
        for line in list(categories.values())[::-1] if len(categories) > 1 else list(lines)[:8]:
            source = next((row for row in lines[line].values() if "file" in row), {})
            table.append((line[1], references(source) + edits(lines[line])))
        return draw_sheet([", ".join(dict.fromkeys(rows["method"]))], table)
    first, source = references(good[0]), good[0]["source_prompt"]
    table = [(heading, edits(cells)) for (_, heading), cells in lines.items()]
    if len(table) == 1:  # in pieces of six, and with the input where there are few
        few = len(first) + len(columns) <= 6
        cells, first = first * few + table[0][1], first * (not few)
        table = [("", cells[i : i + 6]) for i in range(0, len(cells), 6)]
    title = [f'"{good[0]["prompt"]}"', f'from "{source}"' if source else ""]
    return draw_sheet(title, [("", first), *table] if first else table)


def edit_cell(folder: Path, row: dict, words: str) -> Cell:
    if "error" in row:
        return None, f"{words}\nfailed: {row['error']}"
    return folder / row["file"], f"{words}\n{scores(row, list(SCORES)[:3])}"


def scores(row: dict, names: Sequence[str]) -> str:
    """The first two of the named numbers that a row has, a line for each."""
    return "\n".join([f"{SCORES[name]} {show(name, row[name])}" for name in names if name in row][:2])


def draw_sheet(title: Sequence[str], table: Sequence[tuple[str, Sequence[Cell | None]]]) -> Image.Image:
    """Draw lines of pictures with words under them, and a heading above each line where it is not "". Small pictures
    are enlarged by a whole factor, large ones reduced to 512 pixels; None is an empty place."""
    margin, gap, step = 16, 12, 20
    small, large = ImageFont.load_default(15), ImageFont.load_default(22)

    def fitted(path: Path) -> Image.Image:
        with Image.open(path) as picture:
            side = max(picture.size)
            scale = 512 / side if side > 512 else math.ceil(192 / side)
            return picture.convert("RGB").resize([round(n * scale) for n in picture.size], Image.Resampling.LANCZOS)

    def wrapped(text: str, width: int) -> list[str]:
        return [part for line in text.split("\n") for part in textwrap.wrap(line, width // 8)]

    pictures = {cell[0]: fitted(cell[0]) for _, cells in table for cell in cells if cell and cell[0]}
    wide, high = (max(sizes) for sizes in zip(*(picture.size for picture in pictures.values()), strict=True))
    width = max(2 * margin + max(len(cells) for _, cells in table) * (wide + gap) - gap, 480)
    items, y = [], margin  # (x, y, picture or text, font)
    for i, text in enumerate(title):
        for part in textwrap.wrap(text, (width - 2 * margin) // (8 if i else 11)):
            items.append((margin, y, part, small if i else large))
            y += step if i else 30
    for heading, cells in table:
        y += gap
        for part in wrapped(heading, width - 2 * margin):
            items.append((margin, y, part, small))
            y += step
        lowest = y + high
        for i, cell in enumerate(cells):
            if cell is None:
                continue
            x, below = margin + i * (wide + gap), y + high + gap // 2
            items.append((x, y, pictures.get(cell[0]) or Image.new("RGB", (wide, high), "#ebebeb"), None))
            for j, part in enumerate(wrapped(cell[1], wide)):
                items.append((x, below + j * step, part, small))
                lowest = max(lowest, below + (j + 1) * step)
        y = lowest
    image = Image.new("RGB", (width, y + margin), "white")
    draw = ImageDraw.Draw(image)
    for x, y, item, font in items:
        draw.text((x, y), item, "#141414", font) if font else image.paste(item, (x, y))
    return image


# Plots and the page.


def plot(folder: Path, rows, curves: dict) -> list[str]:
    """Write loss.png, a panel for each stage of tuning, and tradeoff.png, where edits with several labels have numbers
    for both: success or the CLIP score against preservation, with standard errors, as in Imagic's figure 9. A line
    joins a method's points in the order of the only setting in which they differ. Returns the files' names."""
    import pandas as pd

    numbers = means(rows, ["label", "method"]) if rows["label"].nunique() > 1 else rows[:0]
    preservation, agreement = ["clip_similarity_to_input", "psnr_to_input"], ["clip_score"]
    if rows["task"].nunique() > 1:
        preservation, agreement = ["psnr_to_input_kept", *preservation], ["success", *agreement]
    x, y = (next((name for name in names if name in numbers), None) for names in (preservation, agreement))
    points = numbers.dropna(subset=[x, y]) if x and y else rows[:0]
    if not curves and len(points) < 2:
        return []
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    figures = {}
    if curves:
        figures["loss"], panels = plt.subplots(1, len(curves), figsize=(5 * len(curves), 3.6), squeeze=False)
        for panel, (stage, values) in zip(panels[0], curves.items(), strict=True):
            for name, curve in values.items():
                series = pd.Series(curve)
                smooth = series.rolling(max(1, len(series) // 10), min_periods=1).mean()
                (line,) = panel.plot(smooth.index, smooth, label=name)
                panel.plot(series.index, series, color=line.get_color(), linewidth=0.7, alpha=0.35)
            panel.set(title=stage, xlabel="step")
            panel.legend()
    if len(points) > 1:
        figures["tradeoff"], panel = plt.subplots(figsize=(7.5, 5))
        axes = [name for name in swept(rows) if name not in AVERAGED]
        for method, group in points.groupby("method", sort=False):
            settings = rows[rows["error"].isna()].groupby("label")[axes].first().loc[group["label"]]
            varied = [name for name in axes if settings[name].nunique() > 1]
            order = pd.to_numeric(settings[varied[0]], errors="coerce") if len(varied) == 1 else None
            joined = order is not None and bool(order.notna().all())
            group = group.set_index("label", drop=False).loc[order.sort_values().index] if joined else group
            errors = [group.get(f"{name}_se") for name in (y, x)]
            panel.errorbar(group[x], group[y], *errors, fmt="o-" if joined else "o", label=method, linewidth=0.8)
            for line in records(group) if len(points) <= 20 else []:
                words = line["label"].removeprefix(f"{method}, ")
                panel.annotate(words, (line[x], line[y]), (5, 4), textcoords="offset points", fontsize=8)
        panel.set(xlabel=x.replace("_", " "), ylabel=y.replace("_", " "))
        panel.legend(fontsize=8)
    for name, figure in figures.items():
        for panel in figure.axes:
            panel.grid(alpha=0.3)
        figure.tight_layout()
        figure.savefig(folder / f"{name}.png", dpi=120)
        plt.close(figure)
    return [f"plots/{name}.png" for name in figures]


def page(title: str, rows) -> str:
    """One HTML page with every task: its input, its edits and the true result. It needs no server, and its few lines of
    script sort and filter."""
    from jinja2 import Environment

    tasks = []
    keys = [name for name in TASK if name in rows]
    for _, group in rows.dropna(subset="task").groupby(keys, sort=False, dropna=False):
        edits = records(group)
        for row in edits:
            row["outcome"] = "failed" if "error" in row else {1: "yes", 0: "no"}.get(row.get("success"), "")
            row["numbers"] = {name: float(f"{row[name]:.6g}") for name in measured(rows) if name in row}
            row["scores"] = scores(row, list(SCORES)[:3])
        tasks.append({"edits": edits} | min(edits, key=lambda row: "error" in row))
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template).render(
        title=title, tasks=tasks, summaries=summaries(rows), left_out=left_out(rows), metrics=measured(rows),
        labels=list(dict.fromkeys(rows["label"])), categories=list(dict.fromkeys(rows["category"])),
    )  # fmt: skip
