"""Benchmarks that lie in a folder of the user's: PIE-Bench, TEdBench, and any list of edits as CSV or JSON lines."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from data.tasks import EditTask, Entry, Tasks
from errors import InputError

PIE_BENCH = "https://github.com/cure-lab/PnPInversion (its README links a form for the data)"
TED_BENCH = "https://github.com/imagic-editing/imagic-editing.github.io (the folder tedbench)"
PIE_TYPES = (
    "random", "change_object", "add_object", "delete_object", "change_content", "change_pose", "change_color",
    "change_material", "change_background", "change_style",
)  # fmt: skip
FIELDS = ("image", "prompt", "source_prompt", "mask", "truth", "category", "name")


class ListOfEdits(Tasks):
    """The user's own list: a .csv file with a header, or .jsonl with one object a line, of

        image, prompt      needed
        source_prompt      what the image shows now
        mask, truth        pictures: white where the edit belongs; the correct result
        category, name     the kind of edit; the task's name, otherwise its number and the image's

    with pictures named relative to the file. Raises InputError, naming the line, for a list that is broken.
    """

    def __init__(self, path: str | None, fit: str = "crop", **choice):
        if not path:
            raise InputError("task.path is missing: name your list of edits, task.path=edits.csv or edits.jsonl")
        file = Path(path).expanduser()
        if not file.is_file():
            raise InputError(f"task.path={path}: there is no such file")
        rows = read_table(file)
        entries = [self.entry(file, line, row, i) for i, (line, row) in enumerate(rows)]
        twice = [name for name, count in Counter(entry.name for entry in entries).items() if count > 1]
        if twice:
            raise InputError(
                f"{file}: two tasks would have the folder {twice[0]}: give them names that differ within 100 letters, "
                "digits, _ and -"
            )
        super().__init__(entries, fit, **choice)

    @staticmethod
    def entry(file: Path, line: int, row: dict, i: int) -> Entry:
        where = f"{file}, line {line}"
        unknown = [str(name) for name in row if name not in FIELDS]
        if unknown:
            raise InputError(f"{where}: {', '.join(unknown)} is unknown; the fields are {', '.join(FIELDS)}")
        row = {name: "" if row.get(name) is None else str(row[name]).strip() for name in FIELDS}
        for name in ("image", "prompt"):
            if not row[name]:
                raise InputError(f"{where}: {name} is missing")
        pictures = {name: file.parent / row[name] if row[name] else None for name in ("image", "mask", "truth")}
        name = folder_name(row["name"] or f"{i:04d}_{pictures['image'].stem}")
        return Entry(name, row["prompt"], row["source_prompt"], row["category"], **pictures)


class PieBench(Tasks):
    """PIE-Bench (Ju et al., 2024, arXiv 2310.01506): 700 images with masks in ten kinds of edits. `path` is the folder
    with `mapping_file.json` and `annotation_images/`."""

    def __init__(self, path: str | None, fit: str = "crop", **choice):
        folder, mapping = found(path, "mapping_file.json", "PIE-Bench", PIE_BENCH)
        entries, self.runs = [], {}
        with well_formed(folder / "mapping_file.json", "PIE-Bench"):
            for name, item in mapping.items():
                kind = PIE_TYPES[int(item["editing_type_id"])]
                prompts = (re.sub(r"[\[\]]", "", item[key]) for key in ("editing_prompt", "original_prompt"))
                image = folder / "annotation_images" / item["image_path"]
                entries.append(Entry(folder_name(name), *prompts, kind, image))
                self.runs[entries[-1].name] = item["mask"]
        super().__init__(entries, fit, **choice)

    def load(self, entry: Entry, size: int, multiple: int = 1) -> EditTask:
        task = super().load(entry, size, multiple)
        mask = Image.fromarray(decode_mask(self.runs[entry.name]) * np.uint8(255))
        task.mask = self.mask(mask, size, multiple)
        task.mask[..., [0, -1], :] = task.mask[..., [0, -1]] = 1  # as in its own evaluation: there it is unreliable
        return task


def decode_mask(runs: Sequence[int], side: int = 512) -> np.ndarray:
    """(side, side) uint8, 1 where the edit belongs, from start and length pairs over the pixels row by row. Raises
    InputError for runs that are no such pairs."""
    pairs = np.asarray(runs, dtype=np.int64).reshape(-1)
    if len(pairs) % 2 or (pairs < 0).any() or (pairs[::2] >= side * side).any():
        raise InputError(f"a mask of PIE-Bench must be pairs of start and length within {side}x{side} pixels")
    mask = np.zeros(side * side, np.uint8)
    for start, length in pairs.reshape(-1, 2):
        mask[start : start + length] = 1
    return mask.reshape(side, side)


class TedBench(Tasks):
    """TEdBench (Kawar et al., 2022, arXiv 2210.09276): 100 target texts for 39 images. `path` is the folder with
    `input_list.json` and `originals/`."""

    def __init__(self, path: str | None, fit: str = "crop", **choice):
        folder, items = found(path, "input_list.json", "TEdBench", TED_BENCH)
        entries = []
        with well_formed(folder / "input_list.json", "TEdBench"):
            for i, item in enumerate(items):
                name = folder_name(f"{i:03d}_{Path(item['img_name']).stem}")
                entries.append(Entry(name, item["target_text"], image=folder / "originals" / item["img_name"]))
        super().__init__(entries, fit, **choice)


def found(path: str | None, index: str, title: str, source: str):
    """The benchmark's folder and what its index file, in JSON, holds. Raises InputError saying where it comes from."""
    folder = Path(path).expanduser() if path else None
    if folder is None or not (folder / index).is_file():
        told = "task.path is missing" if folder is None else f"task.path={path} holds no {index}"
        raise InputError(f"{told}: download {title} from {source}, and name its folder")
    try:
        return folder, json.loads((folder / index).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise InputError(f"{folder / index} is not JSON: {error}") from None


@contextmanager
def well_formed(file: Path, title: str) -> Iterator[None]:
    """Around reading what an index file should hold: InputError where it holds something else."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{file} is not that of {title} ({type(error).__name__}: {error})") from error


def read_table(file: Path) -> list[tuple[int, dict]]:
    """The rows of a .csv or .jsonl file with their line numbers, as dictionaries."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{file} is not UTF-8 text") from None
    if file.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        return [(reader.line_num, {name or "a cell without a header": v for name, v in row.items()}) for row in reader]
    if file.suffix.lower() != ".jsonl":
        raise InputError(f"task.path={file}: the list must be a .csv or a .jsonl file")
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # other ends of lines may stand in a text
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{file}, line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise InputError(f'{file}, line {number}: wanted {{"image": "dog.jpg", "prompt": "a sitting dog"}}')
            rows.append((number, row))
    return rows


def folder_name(text: str) -> str:
    """`text` with what a folder's name, a shell or Hydra could stumble over made "-", of at most 100 bytes, and no name
    of what a run writes for itself: those have dots, but for W&B's."""
    name = re.sub(r"[^\w-]", "-", text).lstrip("-").encode()[:100].decode(errors="ignore")
    return "task" if name.lower() in ("", "wandb") else name
