"""What is to be edited: one picture with a prompt, or a benchmark of many (data/benchmarks.py, data/openmoji_edits.py).

`conf/task/NAME.yaml` names a `Tasks`. It lists its tasks when it is constructed, before any model is loaded, and reads
the pictures of one when that is to be edited: at about `size` x `size` pixels, with sides that are multiples of what
the model needs.
"""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from data.images import FITS, fit_picture, open_rgb, to_tensor
from errors import InputError


@dataclass
class EditTask:
    """One edit. `image`, `truth` (1, 3, H, W) in [-1, 1]; `mask` (1, 1, H, W), 1 where the edit belongs."""

    image: Tensor
    prompt: str  # what the edited picture should show
    source_prompt: str = ""  # what the picture shows now; "" where nobody said
    name: str = "edit"
    mask: Tensor | None = None
    truth: Tensor | None = None  # the correct result, where it is known
    category: str = ""  # the kind of edit, in a benchmark that has kinds

    def to(self, device: torch.device) -> "EditTask":
        moved = {name: getattr(self, name) for name in ("image", "mask", "truth")}
        return replace(self, **{name: None if t is None else t.to(device) for name, t in moved.items()})


@dataclass(frozen=True)
class Entry:
    """A task whose pictures are not read yet. `name` is unique and fit to be a folder's."""

    name: str
    prompt: str
    source_prompt: str = ""
    category: str = ""
    image: Path | None = None
    mask: Path | None = None
    truth: Path | None = None


class Tasks:
    """The chosen `entries`, and among them this process's own `share`.

    `categories` keeps some kinds, `limit` at most so many of each, and `shard` "i/n" the i-th of n shares, counted
    from 0; without it the processes that torchrun started get one each. Raises InputError where a setting is wrong or
    nothing is left.
    """

    single = False  # whether it is the user's one picture, whose files lie in the run's own folder

    def __init__(
        self,
        entries: Sequence[Entry],
        fit: str = "crop",  # crop, pad or stretch to a square, or keep the shape
        categories: str | Sequence[str] | None = None,
        limit: int | None = None,
        shard: str | None = None,
    ):
        if fit not in (*FITS, "keep"):
            raise InputError(f"fit={fit} is unknown: choose from {', '.join(FITS)}, keep")
        self.fit = fit
        self.entries = chosen(entries, categories, limit)
        index, count = parse_shard(shard)
        self.share = self.entries[index::count]

    def load(self, entry: Entry, size: int, multiple: int = 1) -> EditTask:
        """The task with its pictures. Raises InputError for one that cannot be read, or does not fit the others."""
        picture, others = open_rgb(entry.image), {}
        image, (w, h) = self.fitted(picture, size, multiple), picture.size
        for name, path, fitted in (("mask", entry.mask, self.mask), ("truth", entry.truth, self.fitted)):
            if path is not None:
                other = open_rgb(path)
                others[name] = fitted(other, size, multiple)
                alike = abs(w * other.height - h * other.width) <= max(w, h, *other.size)  # but for a pixel
                if not (alike or self.fit == "stretch") or others[name].shape[2:] != image.shape[2:]:
                    theirs = f"{other.width} x {other.height} pixels"
                    raise InputError(f"the {name} {path} has another shape, {theirs}, than its image, {w} x {h}")
        return EditTask(image, entry.prompt, entry.source_prompt, entry.name, category=entry.category, **others)

    def fitted(self, picture: Image.Image, size: int, multiple: int) -> Tensor:
        return to_tensor(fit_picture(picture, size, self.fit, multiple))

    def mask(self, picture: Image.Image, size: int, multiple: int) -> Tensor:
        """(1, 1, H, W), 1 where `picture`, fitted like the image, is at least half white, so also in bars around it."""
        return (self.fitted(picture, size, multiple)[:, :1] >= 0).float()


class OneImage(Tasks):
    """The user's own picture, or the bundled `example` (image, prompt, source_prompt) where none is named."""

    single = True

    def __init__(
        self,
        image: str | None,
        prompt: str | None,
        source_prompt: str | None = None,
        fit: str = "crop",
        example: dict[str, str] | None = None,
    ):
        if image is None and example:
            image = example["image"]
            if prompt is None:
                prompt = example["prompt"]
                source_prompt = example.get("source_prompt") if source_prompt is None else source_prompt
        if image is None:
            raise InputError("image is missing: name the picture to edit, for example image=dog.jpg")
        prompt = "" if prompt is None else str(prompt).strip()
        if not prompt:
            raise InputError('prompt is empty: say what the picture should show, prompt="a dog on a blue background"')
        source_prompt = "" if source_prompt is None else str(source_prompt).strip()
        super().__init__([Entry("edit", prompt, source_prompt)], fit, shard="0/1")
        self.picture = open_rgb(str(image))

    def load(self, entry: Entry, size: int, multiple: int = 1) -> EditTask:
        return EditTask(self.fitted(self.picture, size, multiple), entry.prompt, entry.source_prompt)


def chosen(entries: Sequence[Entry], categories: str | Sequence[str] | None, limit: int | None) -> list[Entry]:
    """Those of the named categories, at most `limit` of each, in their order."""
    known = list(dict.fromkeys(entry.category for entry in entries))
    wanted = [categories] if isinstance(categories, str) else known if categories is None else list(categories)
    for category in wanted:
        if category not in known:
            raise InputError(f"task.categories: there is no {category}; choose from {', '.join(known)}")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise InputError(f"task.limit={limit}: a whole number, 1 or more, of tasks of each category; null for all")
    kept, count = [], Counter()
    for entry in entries:
        count[entry.category] += 1
        if entry.category in wanted and (limit is None or count[entry.category] <= limit):
            kept.append(entry)
    if not kept:
        raise InputError("task: there is nothing to edit in this list")
    return kept


def parse_shard(shard: str | None) -> tuple[int, int]:
    """From "i/n" to (i, n), 0 <= i < n; None -> this process's rank among torchrun's."""
    if shard is None:
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    parts = re.fullmatch(r"(\d+)/(\d+)", str(shard))
    if not parts or not int(parts[1]) < int(parts[2]):
        raise InputError(f"task.shard={shard}: i/n, the i-th of n shares counted from 0, for example 0/4")
    return int(parts[1]), int(parts[2])
