"""A folder of pictures with captions as an endless, deterministic stream of training items.

Captions stand in `metadata.jsonl`, one JSON object a line with `file_name` (relative to the folder) and `text`, as
image-folder data sets on the web have them; or, where there is no such file, in a .txt file of the picture's own
name beside it: dog.jpg and dog.txt.
"""

import hashlib
import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.images import FITS, read_image
from errors import InputError

SPLITS = ("train", "heldout")
METADATA = "metadata.jsonl"
LENGTH = 10**9


class Folder:
    """Every epoch is another permutation of the pictures; item i depends on (split, size, seed, i) alone.

    `held_out` is the share of the pictures, chosen by a hash of their names, that only split "heldout" shows; at
    least one of each where there are two, and with 0 both splits show all. Items are as OpenMoji's, with the file's
    name as "concept". Raises InputError for a missing folder, picture or caption at once, and for a broken picture when
    it is drawn.
    """

    def __init__(
        self,
        path: str | Path | None,
        split: str = "train",
        size: int = 64,
        seed: int = 0,
        fit: str = "crop",  # crop | pad | stretch
        held_out: float = 0.0,  # in [0, 1)
    ):
        if split not in SPLITS:
            raise InputError(f"data.split={split}: choose one of {', '.join(SPLITS)}")
        if fit not in FITS:
            raise InputError(f"data.fit={fit}: choose one of {', '.join(FITS)}")
        if not 0 <= held_out < 1:
            raise InputError(f"data.held_out={held_out} must be at least 0 and below 1")
        if not path:
            raise InputError("data.path is missing: name a folder of pictures with captions, e.g. data.path=photos")
        self.size, self.seed, self.fit, self.split = size, seed, fit, split
        self.folder = Path(path).expanduser()
        self.captions = read_captions(self.folder)
        self.names = _share(sorted(self.captions), split, held_out)
        if not self.names:
            raise InputError(f"data.path={path}: one captioned picture is too few to hold any out; data.held_out=0")

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, i: int) -> dict[str, Tensor | str]:
        epoch, place = divmod(i, len(self.names))
        name = self.names[_permutation(self.seed, SPLITS.index(self.split), epoch, len(self.names))[place]]
        image = read_image(self.folder / name, self.size, self.fit)[0]
        image = ((image + 1) * 127.5).round().to(torch.uint8)
        return {"image": image, "caption": self.captions[name], "concept": name}

    def vocabulary(self) -> list[str]:
        """Texts that hold every word of the captions of both splits."""
        return sorted(set(self.captions.values()))


@lru_cache(maxsize=8)
def _permutation(seed: int, split: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, split, epoch]).permutation(count)


def _share(names: list[str], split: str, held_out: float) -> list[str]:
    """The names of a split: the first `held_out` of them in the order of a hash are held out."""
    if held_out == 0:
        return names
    count = min(max(round(len(names) * held_out), 1), len(names) - 1)
    chosen = set(sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())[:count])
    return [name for name in names if (name in chosen) == (split == "heldout")]


def read_captions(folder: Path) -> dict[str, str]:
    """File names, relative to `folder`, and their captions. Raises InputError where there are none, or they are
    broken: naming the line of metadata.jsonl, or the file."""
    if not folder.is_dir():
        raise InputError(f"data.path={folder}: there is no such folder")
    metadata = folder / METADATA
    captions = _from_metadata(metadata) if metadata.exists() else _from_text_files(folder)
    if not captions:
        raise InputError(
            f"data.path={folder} holds no captioned picture: write {METADATA} with one "
            '{"file_name": "dog.jpg", "text": "a dog"} a line, or a dog.txt beside each dog.jpg'
        )
    return captions


def _from_metadata(metadata: Path) -> dict[str, str]:
    captions = {}
    for number, line in enumerate(_read_text(metadata).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{metadata}, line {number} is not JSON: {error.msg}") from None
        name, text = (entry.get(key) for key in ("file_name", "text")) if isinstance(entry, dict) else (None, None)
        if not (isinstance(name, str) and name and isinstance(text, str)):
            raise InputError(f'{metadata}, line {number}: wanted {{"file_name": "dog.jpg", "text": "a dog"}}')
        if not (metadata.parent / name).is_file():
            raise InputError(f"{metadata}, line {number}: there is no picture {metadata.parent / name}")
        captions[name] = text.strip()
    return captions


def _from_text_files(folder: Path) -> dict[str, str]:
    Image.init()
    captions = {}
    for path in sorted(folder.iterdir()):
        text = path.with_suffix(".txt")
        if path.suffix.lower() in Image.EXTENSION and path.is_file() and text.is_file():
            captions[path.name] = _read_text(text).strip()
    return captions


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None
