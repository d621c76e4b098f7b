"""The edits of a run: one picture with a prompt, or a list of many (data/benchmarks.py, data/openmoji_edits.py).

`conf/task/NAME.yaml` names a `Tasks`. Its constructor lists the tasks, before any model is loaded. `load` reads the
pictures of one task, at about `size` x `size` pixels, with sides that are multiples of the model's own.
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

from data.images import FITS, find, fit_picture, open_mask, open_rgb, opened, to_tensor
from errors import InputError


@dataclass
class EditTask:
    """One edit. `image`, `truth` (1, 3, H, W) in [-1, 1]; `mask` (1, 1, H, W), 1 where the edit belongs."""

    image: Tensor
    prompt: str  # describes the edited picture
    source_prompt: str = ""  # describes the picture before the edit; "" where there is no description
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
    """The chosen `entries`, and the `share` of them that this process edits.

    `categories` keeps some kinds, and `limit` at most that many of each. `shard` "i/n" is the i-th of n shares,
    counted from 0; by default the processes of torchrun get one each. Raises InputError for a wrong setting, and where
    no task is left.
    """

    single = False  # True for one picture: its files go to the run's own folder

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
        """Read the task's pictures. Raises InputError for a broken one, and for a mask or truth of another shape."""
        pictures = {"image": open_rgb(entry.image), "mask": self.mask(entry)}
        pictures["truth"] = open_rgb(entry.truth) if entry.truth else None
        tensors, (w, h) = {}, pictures["image"].size
        for name, other in pictures.items():
            if other is not None:
                tensors[name] = to_tensor(fit_picture(other, size, self.fit, multiple))
                alike = abs(w * other.height - h * other.width) <= max(w, h, *other.size)  # but for a pixel
                if not (alike or self.fit == "stretch") or tensors[name].shape != tensors["image"].shape:
                    shapes = f"{other.width} x {other.height} pixels, than its image, {w} x {h}"
                    raise InputError(f"the {name} of task {entry.name} has another shape, {shapes}")
        if "mask" in tensors:  # fitted like the image, so bars around it count as edited
            tensors["mask"] = (tensors["mask"][:, :1] >= 0).float()
        texts = {name: getattr(entry, name) for name in ("prompt", "source_prompt", "name", "category")}
        return EditTask(**tensors, **texts)

    def mask(self, entry: Entry) -> Image.Image | None:
        """White where the edit belongs, else black."""
        return open_mask(entry.mask) if entry.mask else None


class OneImage(Tasks):
    """The user's own picture, or the bundled `example` (image, prompt, source_prompt) where none is named.

    Raises InputError for a missing picture or prompt, and for several processes, which would write the same files.
    """

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
        prompt, source_prompt = ("" if text is None else str(text).strip() for text in (prompt, source_prompt))
        if not prompt:
            raise InputError('prompt is empty: say what the picture should show, prompt="a dog on a blue background"')
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise InputError("torchrun shares the tasks of a list: edit one picture without it, or name a task=")
        with opened(image):  # only its header, so that a missing file ends the run early
            pass
        super().__init__([Entry("edit", prompt, source_prompt, image=find(image))], fit)


def chosen(entries: Sequence[Entry], categories: str | Sequence[str] | None, limit: int | None) -> list[Entry]:
    """Those of the named categories, at most `limit` of each, in their order."""
    known = list(dict.fromkeys(entry.category for entry in entries))
    wanted = [categories] if isinstance(categories, str) else known if categories is None else list(categories)
    for category in wanted:
        if category not in known:
            raise InputError(f"task.categories: there is no {category}; choose from {', '.join(known)}")
    if limit is not None and (not isinstance(limit, int) or limit < 1):
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
