"""Numbers over many edits: their means, how each is written, and tables that read well as text and as Markdown."""

from collections.abc import Iterable, Sequence

HEADLINE = (  # of all numbers, those of the tables that are printed
    "edits", "failed", "missing", "success", "attainable", "psnr_to_truth", "psnr_to_input", "psnr_to_input_kept",
    "clip_score", "clip_similarity_to_input", "structure_distance_to_input", "lpips_to_input_kept", "seconds",
)  # fmt: skip


def unique(values: Iterable) -> list:
    """Without repetitions, in the order of first appearance."""
    return list(dict.fromkeys(values))


def means(rows: Sequence[dict]) -> dict[str, float]:
    """How many edits there are and how many failed, and the mean of each metric over the edits that have it."""
    measured = [row["metrics"] for row in rows if "error" not in row]
    values = {name: [m[name] for m in measured if name in m] for name in unique(n for m in measured for n in m)}
    counts = {"edits": len(measured), "failed": len(rows) - len(measured)}
    return counts | {name: sum(v) / len(v) for name, v in values.items()}


def by_label(rows: Sequence[dict]) -> dict[str, dict[str, dict]]:
    """For each `label` of the rows the means over all, as "overall", and of each category, as "by_category"."""
    groups = {label: [row for row in rows if row["label"] == label] for label in unique(r["label"] for r in rows)}
    return {
        label: {
            "overall": means(group),
            "by_category": {
                category: means([row for row in group if row["category"] == category])
                for category in unique(row["category"] for row in group)
            },
        }
        for label, group in groups.items()
    }


def never_measured(rows: Sequence[dict]) -> dict[str, str]:
    """The metrics that no edit has, each with the reason."""
    reasons = {name: why for row in rows for name, why in row.get("left_out", {}).items()}
    return {name: why for name, why in reasons.items() if not any(name in row.get("metrics", {}) for row in rows)}


def show(name: str, value: float | None) -> str:
    """A number as a table has it: shares in per cent, decibels and seconds with one place, cosines with three."""
    if value is None:
        return ""
    if name.startswith(("success", "attainable")):
        return f"{value:.0%}"
    places = 0 if name in ("edits", "failed", "missing") else 1 if name.startswith(("psnr", "seconds")) else 3
    return f"{value:.{places}f}"


def aligned(numbers: dict[str, dict[str, float]], columns: Sequence[str], corner: str) -> str:
    """Some of the numbers as a Markdown table, a row for each name, with columns of even width."""
    cells = [[corner, *columns]]
    cells += [[name, *(show(column, mean.get(column)) for column in columns)] for name, mean in numbers.items()]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * width for width in widths]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in [padded[0], rule, *padded[1:]])
