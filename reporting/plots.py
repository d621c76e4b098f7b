"""Curves of a run: the loss of each tuning stage, and what eta trades, agreement with the text against likeness to
the input (as Imagic's figure 9 does, whose likeness is 1 - LPIPS; here it is CLIP's, or PSNR without a CLIP). And the
methods of a sweep as points."""

import logging
from collections import defaultdict
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter

logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it tells of its font cache

Curves = dict[str, dict[str, list[tuple[int, float]]]]  # stage -> value's name -> [(step, value), ...]


def plot_curves(curves: Curves, path: Path) -> None:
    """One panel for each stage, one line for each of its values: a running mean over a tenth of the steps, since
    single draws of timestep and noise differ wildly, and the draws themselves faint behind it."""
    stages = [stage for stage in curves if curves[stage]]
    figure, panels = plt.subplots(1, len(stages), figsize=(5 * len(stages), 3.6), squeeze=False)
    for stage, panel in zip(stages, panels[0], strict=True):
        for name, points in curves[stage].items():
            steps, values = zip(*points, strict=True)
            span = max(1, len(values) // 10)
            recent = [values[max(0, i + 1 - span) : i + 1] for i in range(len(values))]
            (line,) = panel.plot(steps, [sum(r) / len(r) for r in recent], label=name)
            panel.plot(steps, values, color=line.get_color(), linewidth=0.7, alpha=0.35)
        panel.set(title=stage, xlabel="step")
        panel.legend()
        panel.grid(alpha=0.3)
    _save(figure, path)


def plot_tradeoff(records: list[dict], setting: str, scores: tuple[str, str], path: Path) -> bool:
    """Two scores of the edits against a setting on two axes, each edit a dot and their mean a line. `records`
    are {"settings": {...}, "metrics": {...}}. False, and no file, where the setting has under two values."""
    found = [r for r in records if isinstance(r["settings"].get(setting), int | float)]
    if len({r["settings"][setting] for r in found}) < 2:
        return False
    figure, left = plt.subplots(figsize=(6, 4))
    for axis, score, color in zip((left, left.twinx()), scores, ("tab:red", "tab:blue"), strict=True):
        by_value = defaultdict(list)
        for record in found:
            if score in record["metrics"]:
                by_value[record["settings"][setting]].append(record["metrics"][score])
        if not by_value:
            axis.set_yticks([])
            continue
        for value, measured in by_value.items():
            axis.plot([value] * len(measured), measured, ".", color=color, alpha=0.4)
        values = sorted(by_value)
        axis.plot(values, [sum(by_value[v]) / len(by_value[v]) for v in values], color=color)
        axis.set_ylabel(score.replace("_", " "), color=color)
        axis.tick_params(axis="y", labelcolor=color)
    left.set_xlabel(setting)
    left.grid(alpha=0.3)
    _save(figure, path)
    return True


def plot_points(points: Sequence[tuple[str, float, float]], axes: Sequence[str], path: Path) -> None:
    """A point for each (label, x, y). Labels that begin alike, up to a comma, are one method's settings and share a
    colour; a line joins them in the order of the one number that they differ in. Too many labels are left out."""
    figure, panel = plt.subplots(figsize=(7.5, 5))
    families, named = defaultdict(list), len(points) <= 20 and sum(len(label) for label, *_ in points) <= 800
    for label, x, y in points:
        families[label.split(",")[0]].append((label, x, y))
    middle = (min(x for _, x, _ in points) + max(x for _, x, _ in points)) / 2
    below = {label: rank % 2 for rank, (label, *_) in enumerate(sorted(points, key=lambda point: point[1]))}
    for name, members in families.items():
        settings = zip_longest(*(label.split(", ") for label, *_ in members))
        try:
            (differing,) = (values for values in settings if len(set(values)) > 1)
            names, order = zip(*(value.rsplit(" ", 1) for value in differing), strict=True)
            (_,) = set(names)
            members = [member for _, member in sorted(zip(map(float, order), members, strict=True))]
            line = "o-"
        except (AttributeError, ValueError):  # none, several, or something else than a number
            line = "o"
        _, xs, ys = zip(*members, strict=True)
        panel.plot(xs, ys, line, label=name, linewidth=0.8)
        for label, x, y in members if named else ():
            text = label.partition(",")[2].strip() or label
            side, ha = (-5, "right") if x > middle else (5, "left")
            offset = (side, -11 if below[label] else 4)
            panel.annotate(text, (x, y), offset, textcoords="offset points", ha=ha, fontsize=8)
    if not named or (len(families) > 1 and any("," in label for label, *_ in points)):
        panel.legend(fontsize=8)
    kept = {"psnr_to_input_kept": "PSNR to input, kept part (dB)", "psnr_to_input": "PSNR to input (dB)"}
    panel.set(xlabel=kept.get(axes[0], axes[0]), ylabel=axes[1].replace("_", " "))
    panel.margins(0.12)
    if axes[1] == "success":
        panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        low, high = panel.get_ylim()
        panel.set_ylim(max(-0.015, min(low, high - 0.2)), min(1.015, max(high, low + 0.2)))
    panel.grid(alpha=0.3)
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120, format="png")  # whatever the name: a file may have a temporary one first
    plt.close(figure)
