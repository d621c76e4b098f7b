"""One HTML page on which every task of a benchmark stands with its input, its edits and the true result side by side.

It is one file beside the pictures, and needs no server and nothing from elsewhere: what is shown is in the page, a few
lines of script sort and filter it, and the choice is kept in the address, so that a view can be linked.
"""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from files import whole_file
from reporting.tables import HEADLINE, by_label, never_measured, show, unique

UNDER = (
    "success",
    "clip_score",
    "psnr_to_truth",
    "psnr_to_input_kept",
    "psnr_to_input",
)  # two of them, under each edit


def write_page(path: Path, title: str, rows: Sequence[dict]) -> None:
    """The page at `path` for `rows` as `benchmark.rows_of` makes them, each with a `label`, which says what made the
    edit, and a `place`, the folder of its run as seen from the page, "" or "folder/"."""
    categories = unique(row["category"] for row in rows)
    tasks: dict[tuple, list[dict]] = {}  # two lists of one sweep may each have a task of that name
    for row in rows:
        tasks.setdefault((row["task"], row.get("prompt")), []).append(row)
    parts = {
        "title": escape(title),
        "summary": summary_table(rows, categories),
        "categories": options(categories),
        "labels": options(unique(row["label"] for row in rows)),
        "numbers": options(unique(name for row in rows for name in row.get("metrics", {}))),
        "head": "<th>true result</th>" if any(truth_of(path.parent, group) for group in tasks.values()) else "",
        "rows": "\n".join(task_row(path.parent, name, group) for (name, _), group in tasks.items()),
        "not_measured": not_measured(rows),
    }
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    for name, text in parts.items():
        page = page.replace(f"<!--{name}-->", text)
    with whole_file(path) as partial:
        partial.write_text(page, encoding="utf-8")


def options(names: Sequence[str]) -> str:
    return "".join(f'<option value="{escape(name)}">{escape(name) or "(none)"}</option>' for name in names)


def truth_of(folder: Path, group: Sequence[dict]) -> str:
    """The true result of a task, seen from the page; "" where there is none."""
    return next((file for row in group if (folder / (file := f"{row['place']}{row['task']}/truth.png")).exists()), "")


def picture(file: str, alt: str) -> str:
    return f'<a href="{quote(file)}"><img src="{quote(file)}" alt="{escape(alt)}" loading="lazy"></a>'


def task_row(folder: Path, name: str, group: Sequence[dict]) -> str:
    """A row of the table: what was asked, the input, all edits and the true result."""
    about = next((row for row in group if "prompt" in row), {"prompt": ""})
    source = next((row["place"] for row in group if (folder / row["place"] / name / "input.png").exists()), None)
    truth = truth_of(folder, group)
    asked = [f"<b>{escape(name)}</b>", *filter(None, [escape(group[0]["category"])])]
    for word, text in (("from", about.get("source_prompt")), ("to", about["prompt"])):
        asked += [f"{word}: {escape(text)}"] if text else []
    return (
        f'<tr tabindex="-1" data-category="{escape(group[0]["category"])}"><th scope="row">{"<br>".join(asked)}</th>'
        f"<td>{'' if source is None else picture(f'{source}{name}/input.png', f'input of {name}')}</td>"
        f'<td class="edits">{"".join(figure(row) for row in group)}</td>'
        f"<td>{picture(truth, f'true result of {name}') if truth else ''}</td></tr>"
    )


def figure(row: dict) -> str:
    """One edit, or the word that it failed."""
    label = escape(row["label"])
    if "error" in row:
        return (
            f'<figure data-label="{label}" data-success="failed" data-numbers="{{}}"><p class="failed">failed</p>'
            f"<figcaption>{label}<br><small>{escape(row['error'])}</small></figcaption></figure>"
        )
    numbers = row["metrics"]
    rounded = escape(json.dumps({name: float(f"{value:.6g}") for name, value in numbers.items()}))
    success = {1: "yes", 0: "no"}.get(numbers.get("success"), "")
    mark = {"yes": '<span class="yes">✓ success</span><br>', "no": '<span class="no">✗ no success</span><br>', "": ""}
    under = [f"{name.replace('_', ' ')} {show(name, numbers[name])}" for name in UNDER[1:] if name in numbers][:2]
    sample = f", sample {row['sample']}" if row.get("sample") else ""
    return (
        f'<figure data-label="{label}" data-success="{success}" data-numbers="{rounded}">'
        + picture(row["place"] + row["file"], f"edit of {row['task']} by {row['label']}")
        + f"<figcaption>{label}{sample}<br>{mark[success]}<small>{'<br>'.join(under)}</small>"
        '<small class="sorted"></small><details><summary>all numbers</summary></details></figcaption></figure>'
    )


def summary_table(rows: Sequence[dict], categories: Sequence[str]) -> str:
    """Means by label, and where success is known, its share in each category."""
    numbers = by_label(rows)
    columns = [name for name in HEADLINE if any(name in found["overall"] for found in numbers.values())]
    kinds = categories if "success" in columns and len(categories) > 1 else []
    head = [*columns, *(f"success: {category or 'no category'}" for category in kinds)]
    lines = ["<tr><th></th>" + "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in head) + "</tr>"]
    for label, found in numbers.items():
        cells = [show(name, found["overall"].get(name)) for name in columns]
        cells += [show("success", found["by_category"].get(category, {}).get("success")) for category in kinds]
        lines.append(f'<tr><th scope="row">{escape(label)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    return f'<table class="summary">{"".join(lines)}</table>'


def not_measured(rows: Sequence[dict]) -> str:
    """The metrics that no edit has, by the reason."""
    names: dict[str, list[str]] = {}
    for name, why in never_measured(rows).items():
        names.setdefault(why, []).append(name)
    items = "".join(f"<li>{escape(', '.join(some))}: {escape(why)}</li>" for why, some in names.items())
    return f"<h2>Not measured</h2><ul>{items}</ul>" if items else ""
