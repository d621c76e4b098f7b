"""Pictures side by side with words under them: a run's contact sheet, and a sweep's summary.

Text is drawn with Pillow's own scalable font, so a sheet looks the same, byte by byte, on every machine.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

MIN_SIDE, MAX_SIDE = 192, 512  # pixels of a picture on a sheet
MARGIN, GAP = 16, 12
INK, FAINT, PAPER = (20, 20, 20), (110, 110, 110), (255, 255, 255)


@dataclass
class Cell:
    """A picture, or its file, and the lines under it; None leaves a grey field, for what failed."""

    picture: Image.Image | Path | None
    lines: list[str] = field(default_factory=list)


def brief(value: object) -> str:
    """A setting as a person writes it: 0.7, not 0.7000000000000001; also one that was typed."""
    if isinstance(value, str) and re.fullmatch(r"-?\d*\.\d{4,}(e[+-]?\d+)?", value):
        value = float(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def describe(settings: dict) -> str:
    return ", ".join(f"{name} {brief(value)}" for name, value in settings.items())


def scores(metrics: dict[str, float]) -> str:
    """The two numbers of an edit that belong under its picture."""
    if "clip_score" in metrics:
        return f"CLIP {metrics['clip_score']:.3f}, similarity {metrics['clip_similarity_to_input']:.3f}"
    return f"PSNR to input {metrics['psnr_to_input']:.1f} dB"


def enlarge(picture: Image.Image | Path) -> Image.Image:
    """Small pictures by a whole factor, large ones shrunk. A file is closed again: a sheet may have thousands."""
    if isinstance(picture, Path):
        picture = Image.open(picture).convert("RGB")
    factor = math.ceil(MIN_SIDE / max(picture.size))
    if factor > 1:
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)
    if max(picture.size) > MAX_SIDE:
        picture = picture.copy()
        picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return picture


def wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """`text` in lines no wider than `width` pixels, broken at spaces, or inside a word that is wider."""
    lines = [""]
    for word in text.split():
        line = f"{lines[-1]} {word}".strip()
        if font.getlength(line) <= width:
            lines[-1] = line
            continue
        lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return [line for line in lines if line]


def grid(
    title: Sequence[str],
    rows: Sequence[Sequence[Cell | None]],
    row_names: Sequence[str] | None = None,
    column_names: Sequence[str] | None = None,
) -> Image.Image:
    """A sheet: the first line of the title large, the others small, then rows of cells (None stays empty),
    with names left of the rows and above the columns where they are given."""
    large, small = ImageFont.load_default(22), ImageFont.load_default(15)
    shown = [[c and Cell(c.picture and enlarge(c.picture), c.lines) for c in row] for row in rows]
    sizes = [c.picture.size for row in shown for c in row if c and c.picture] or [(MIN_SIDE, MIN_SIDE)]
    cell_width, cell_height = max(w for w, _ in sizes), max(h for _, h in sizes)
    columns = max(len(row) for row in shown)
    left = MARGIN + (max(small.getlength(n) for n in row_names) + GAP if row_names else 0)
    left = math.ceil(min(left, MARGIN + 260))
    width = max(left + columns * (cell_width + GAP) - GAP + MARGIN, 480)
    line = 20

    heading = [(part, large, 30, INK) for part in wrap(title[0], large, width - 2 * MARGIN)]
    for text in title[1:]:
        heading += [(part, small, line, FAINT) for part in wrap(text, small, width - 2 * MARGIN)]
    captions = [
        [[part for t in cell.lines for part in wrap(t, small, cell_width)] if cell else [] for cell in r] for r in shown
    ]
    heads = [wrap(name, small, cell_width) for name in column_names or []]
    head_lines = max((len(h) for h in heads), default=0)
    head_height = head_lines * line + (4 if head_lines else 0)
    row_heights = [cell_height + GAP // 2 + line * max(len(c) for c in row) + GAP for row in captions]
    above = MARGIN + sum(step for _, _, step, _ in heading) + GAP + head_height
    height = above + sum(row_heights) + MARGIN

    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    y = MARGIN
    for text, font, step, ink in heading:
        draw.text((MARGIN, y), text, fill=ink, font=font)
        y += step
    y += GAP
    for i, head in enumerate(heads):
        for j, text in enumerate(head):
            draw.text((left + i * (cell_width + GAP), y + j * line), text, fill=INK, font=small)
    y += head_height
    for r, row in enumerate(shown):
        for j, text in enumerate(wrap(row_names[r], small, left - MARGIN - GAP / 2) if row_names else []):
            draw.text((MARGIN, y + cell_height // 2 - line // 2 + j * line), text, fill=INK, font=small)
        for i, cell in enumerate(row):
            x = left + i * (cell_width + GAP)
            if cell is None:
                continue
            if cell.picture is None:
                draw.rectangle((x, y, x + cell_width - 1, y + cell_height - 1), fill=(235, 235, 235))
            else:
                sheet.paste(cell.picture, (x, y))
            for j, text in enumerate(captions[r][i]):
                at = (x, y + cell_height + GAP // 2 + j * line)
                draw.text(at, text, fill=INK if cell.picture else FAINT, font=small)
        y += row_heights[r]
    return sheet


def contact_sheet(title: Sequence[str], references: Sequence[Cell], edits: Sequence[Cell]) -> Image.Image:
    """`references` (input, reconstruction) and the edits: in one row as long as that stays readable."""
    if len(references) + len(edits) <= 6:
        return grid(title, [[*references, *edits]])
    columns = next((n for n in (6, 5, 4) if len(edits) % n == 0), 6)
    return grid(title, [references, *(edits[i : i + columns] for i in range(0, len(edits), columns))])
