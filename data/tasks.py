"""The edits of a run: one picture with a prompt, or a list of many (data/benchmarks.py, data/openmoji_edits.py).

`conf/task/NAME.yaml` names a `Tasks`. Its constructor lists the tasks, before any model is loaded. `load` reads the
pictures of one task, at about `size` x `size` pixels, with sides that are multiples of the model's own.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from data.images import FITS, find, fit_picture, open_mask, open_rgb, size_of, to_tensor
from errors import InputError, check_number


@dataclass
class EditTask:
    """One edit. `image`, `truth` (1, 3, H, W) in [-1, 1]; `mask` (1, 1, H, W), 1 where the edit belongs, for metrics;
    `region` (1, 1, H, W) in [0, 1], outside which the picture is to stay as it is, for any method."""

    image: Tensor
    prompt: str  # describes the edited picture
    source_prompt: str = ""  # describes the picture before the edit; "" where there is no description
    name: str = "edit"
    mask: Tensor | None = None
    truth: Tensor | None = None  # the correct result, where it is known
    category: str = ""  # the kind of edit, in a benchmark that has kinds
    negative_prompt: str = ""  # guidance leads away from it
    blend_word: str = ""  # "cat dog": the source prompt's word and the prompt's, for Prompt-to-Prompt's local blending
    region: Tensor | None = None
    feather: int | None = 0  # pixels inside the region over which the input's own fade out; None: they are not laid in

    def to(self, device: torch.device) -> "EditTask":
        moved = {name: getattr(self, name) for name in ("image", "mask", "truth", "region")}
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
    negative_prompt: str = ""
    blend_word: str = ""


class Tasks:
    """The chosen `entries`, and the `share` of them that this process edits.

    `fit` crops, pads or stretches pictures to a square, or keeps their shape. `categories`, one or a list, keeps some
    kinds, and `limit` at most that many of each. `shard` "i/n" is the i-th of n shares, counted from 0, for processes
    side by side. With `confine` the masks hold the edits, and do not only serve metrics. Raises InputError for a wrong
    setting, where no task is left, and for a picture that is missing or of another shape than its image."""

    single = False  # True for one picture: its files go to the run's own folder

    def __init__(self, entries: Sequence[Entry], fit="crop", categories=None, limit=None, shard=None, confine=False):
        if fit not in (*FITS, "keep"):
            raise InputError(f"fit={fit} is unknown: choose from {', '.join(FITS)}, keep")
        check_number("task.limit", 1 if limit is None else limit, whole=True, low=1)
        kinds: dict[str, list[Entry]] = {}
        for entry in entries:
            kinds.setdefault(entry.category, []).append(entry)
        chosen = set()
        wanted = categories if isinstance(categories, list) else [categories]
        for kind in kinds if categories is None else map(str, wanted):
            if kind not in kinds:
                raise InputError(f"task.categories: there is no {kind}; choose from {', '.join(kinds)}")
            chosen |= {entry.name for entry in kinds[kind][:limit]}
        if not chosen:
            raise InputError("task: there is nothing to edit in this list")
        self.fit, self.confine = fit, confine
        self.entries = [entry for entry in entries if entry.name in chosen]
        for entry in self.entries:
            paths = {name: getattr(entry, name) for name in ("image", "mask", "truth")}
            check_shapes(entry, {name: size_of(path) for name, path in paths.items() if path})
        parts = re.fullmatch(r"(\d+)/(\d+)", "0/1" if shard is None else str(shard))
        index, count = map(int, parts.groups()) if parts else (1, 0)
        if index >= count:
            raise InputError(f"task.shard={shard}: i/n, the i-th of n shares counted from 0, for example 0/4")
        self.share = self.entries[index::count]

    def load(self, entry: Entry, size: int, multiple: int = 1) -> EditTask:
        """Read the task's pictures. Raises InputError for a broken one, and for a mask or truth of another shape."""
        pictures, soft = {"image": open_rgb(entry.image)}, self.mask(entry)
        if soft:
            pictures["mask"] = soft.point(lambda v: 255 * (v > 0))
        if entry.truth:
            pictures["truth"] = open_rgb(entry.truth)
        check_shapes(entry, {name: picture.size for name, picture in pictures.items()})
        sides = fit_picture(pictures["image"], size, self.fit, multiple).size
        fit = FITS["stretch" if self.fit == "keep" else self.fit]
        tensors = {name: to_tensor(fit(x, sides, Image.Resampling.LANCZOS)) for name, x in pictures.items()}
        if soft:  # fitted like the image, so bars around it count as edited
            tensors["mask"] = (tensors["mask"][:, :1] >= 0).float()
            if self.confine:  # by a filter without lobes, which would reach beyond the edge
                tensors["region"] = to_tensor(fit(soft, sides, Image.Resampling.BILINEAR))[:, :1] / 2 + 0.5
        return EditTask(**vars(entry) | {"mask": None, "truth": None} | tensors)

    def mask(self, entry: Entry) -> Image.Image | None:
        """White where the edit belongs, grey at soft edges, else black."""
        return open_mask(entry.mask) if entry.mask else None


def check_shapes(entry: Entry, sizes: dict[str, tuple[int, int]]) -> None:
    """Raise InputError where the sides of a picture are not those of the image, but for a factor and a pixel."""
    for name, (wide, high) in sizes.items():
        if abs(wide * sizes["image"][1] - high * sizes["image"][0]) > max(wide, high, *sizes["image"]):
            raise InputError(f"the {name} of task {entry.name} has another shape than its image")


class OneImage(Tasks):
    """The user's own picture, or the bundled `example` where none is named. Raises InputError where one is missing."""

    single = True

    def __init__(self, image, prompt, fit="crop", example=None, mask=None, source_prompt=None, negative_prompt=None):
        if image is None and example:
            image = example["image"]
            if prompt is None:
                prompt, source_prompt = example["prompt"], source_prompt or example["source_prompt"]
        texts = {"prompt": prompt, "source_prompt": source_prompt, "negative_prompt": negative_prompt}
        texts = {name: "" if v is None else str(v).strip() for name, v in texts.items()}
        if image is None or not texts["prompt"]:
            raise InputError('name the picture and say what it should show: image=dog.jpg prompt="a sitting dog"')
        super().__init__([Entry("edit", image=find(image), mask=mask and find(mask), **texts)], fit, confine=True)
