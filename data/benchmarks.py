"""Lists of edits in a folder of the user's: PIE-Bench, TEdBench, and any list as CSV or JSON lines."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.tables import read_rows
from data.tasks import EditTask, Entry, Tasks
from errors import InputError

PIE_BENCH = "PIE-Bench (a form for it: https://github.com/cure-lab/PnPInversion)"
TED_BENCH = "TEdBench (https://github.com/imagic-editing/imagic-editing.github.io, the folder tedbench)"
PIE_TYPES = ["random", "change_object", "add_object", "delete_object"]
PIE_TYPES += [f"change_{what}" for what in ("content", "pose", "color", "material", "background", "style")]


class ListOfEdits(Tasks):
    """The user's own list: a .csv file with a header, or .jsonl with one object a line. Each edit has an `image` and a
    `prompt`, and others of an Entry's fields: see conf/task/folder.yaml. Raises InputError with the line of a fault."""

    def __init__(self, path: str | None, fit: str = "crop", **choice):
        file = Path(str(path or "")).expanduser()
        if not file.is_file():
            raise InputError(f"task.path={path}: there is no such list of edits; name a .csv or .jsonl file")
        entries = {}
        for i, (place, row) in enumerate(read_rows(file)):
            for name, value in row.items():
                if name not in Entry.__annotations__ or isinstance(value, (list, dict)):
                    raise InputError(f"{place}: {name!r} must be a text, and one of {', '.join(Entry.__annotations__)}")
            texts = {name: str(value).strip() for name, value in row.items() if value is not None}
            texts = {name: text for name, text in texts.items() if text}
            if not texts.keys() >= {"image", "prompt"}:
                raise InputError(f"{place}: image and prompt are needed")
            paths = {name: file.parent / texts.pop(name) for name in ("image", "mask", "truth") if name in texts}
            name = folder_name(texts.pop("name", f"{i:04d}_{paths['image'].stem}"))
            if name in entries:
                raise InputError(f"{place}: another task has the folder {name} too; give it a name of its own")
            entries[name] = Entry(name, **texts | paths)
        super().__init__(list(entries.values()), fit, **choice)


class PieBench(Tasks):
    """PIE-Bench (Ju et al., 2024, arXiv 2310.01506): 700 images with masks in ten kinds of edits. `path` is the folder
    with `mapping_file.json` and `annotation_images/`."""

    def __init__(self, path: str | None, fit: str = "crop", **choice):
        entries, self.runs = [], {}
        with index(path, "mapping_file.json", PIE_BENCH) as (folder, mapping):
            for name, item in mapping.items():
                kind = PIE_TYPES[int(item["editing_type_id"])]
                prompts = (re.sub(r"[\[\]]", "", item[key]) for key in ("editing_prompt", "original_prompt"))
                image, words = folder / "annotation_images" / item["image_path"], item.get("blended_word", "").split()
                entries.append(Entry(folder_name(name), *prompts, kind, image, blend_word=" ".join(words[:2])))
                self.runs[entries[-1].name] = item["mask"]
                self.mask(entries[-1])  # now, not amid the work
        super().__init__(entries, fit, **choice)

    def load(self, entry: Entry, size: int, multiple: int = 1) -> EditTask:
        task = super().load(entry, size, multiple)
        task.mask[..., [0, -1], :] = task.mask[..., [0, -1]] = 1  # as in its own evaluation: there it is unreliable
        return task

    def mask(self, entry: Entry) -> Image.Image:
        """White in runs, start and length, over the pixels of 512 rows."""
        mask, runs = np.zeros(512 * 512, np.uint8), self.runs[entry.name]
        for start, length in zip(runs[::2], runs[1::2], strict=True):
            mask[start : start + length] = 255
        return Image.fromarray(mask.reshape(512, 512))


class TedBench(Tasks):
    """TEdBench (Kawar et al., 2022, arXiv 2210.09276): 100 target texts for 39 images, in the folder `path`."""

    def __init__(self, path: str | None, fit: str = "crop", **choice):
        entries = []
        with index(path, "input_list.json", TED_BENCH) as (folder, items):
            for i, item in enumerate(items):
                image = folder / "originals" / item["img_name"]
                entries.append(Entry(folder_name(f"{i:03d}_{image.stem}"), item["target_text"].strip(), image=image))
        super().__init__(entries, fit, **choice)


@contextmanager
def index(path: str | None, name: str, source: str) -> Iterator[tuple[Path, Any]]:
    """A benchmark's folder and the content of its index file, in JSON, to be read inside. Raises InputError with the
    address of the data where the file is missing or other than theirs."""
    folder = Path(str(path or "")).expanduser()
    try:
        yield folder, json.loads((folder / name).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"task.path={path} holds no {name} of {source}: {error!r}") from error


def folder_name(text: str) -> str:
    """`text` as the name of a folder: at most 100 bytes of letters, digits, _ and -, and not one that a run uses."""
    name = re.sub(r"[^\w-]", "-", text).lstrip("-").encode()[:100].decode(errors="ignore")
    return "task" if name.lower() in ("", "wandb") else name
