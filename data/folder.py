"""A folder of pictures with captions as an endless, deterministic stream of training items.

Captions stand in `metadata.jsonl` or `metadata.csv`, with `file_name` (relative to that file) and `text`, as
image-folder data sets on the web have them; or in a .txt or .caption file of the picture's own name beside it: dog.jpg
and dog.txt. Sub-folders count too; names that begin with a dot do not.
"""

import hashlib
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.images import FITS, fit_picture, open_rgb
from data.tables import read_rows, read_text
from errors import InputError, check_number


class Folder:
    """Every epoch is another permutation of the pictures; item i depends on (split, size, seed, i) alone. `held_out` is
    the share of the pictures, chosen by a hash of their names, that only split "heldout" shows; at least one of each
    where there are two, and with 0 both splits show all. Items are as OpenMoji's. Raises InputError for a missing
    folder, picture or caption at once, and for a broken picture when it is drawn."""

    def __init__(self, path: str | Path, split="train", size: int = 64, seed: int = 0, fit="crop", held_out=0.0):
        check_number("data.held_out", held_out, high=0.999999)
        if fit not in FITS:
            raise InputError(f"data.fit={fit} must be one of {', '.join(FITS)}")
        self.size, self.seed, self.fit, self.heldout = size, seed, fit, split == "heldout"
        self.folder = Path(str(path)).expanduser()
        self.captions = read_captions(self.folder)
        self.names = sorted(self.captions)
        if held_out:
            by_hash = sorted(self.names, key=lambda name: hashlib.sha256(os.fsencode(name)).hexdigest())
            count = min(max(round(len(by_hash) * held_out), 1), len(by_hash) - 1)
            self.names = sorted(by_hash[:count] if self.heldout else by_hash[count:])
        if not self.names:
            raise InputError(f"data.path={path}: one captioned picture is too few to hold any out; data.held_out=0")

    def __getitem__(self, i: int) -> dict[str, Tensor | str]:
        epoch, place = divmod(i, len(self.names))
        order = np.random.default_rng([self.seed, int(self.heldout), epoch]).permutation(len(self.names))
        name = self.names[order[place]]
        image = fit_picture(open_rgb(self.folder / name), self.size, self.fit)
        return {"image": torch.from_numpy(np.array(image)).permute(2, 0, 1), "caption": self.captions[name]}

    def vocabulary(self) -> list[str]:
        """Texts that hold every word of the captions of both splits."""
        return sorted(set(self.captions.values()))


def read_captions(folder: Path) -> dict[str, str]:
    """File names, relative to `folder`, and their captions; of several captions of a picture the first. Warns of
    pictures without a caption. Raises InputError where no caption is found, and with the place of a broken one."""
    files = {path: None for path in sorted(folder.rglob("*")) if "/." not in f"/{path.relative_to(folder).as_posix()}"}
    found = []
    for file in files:
        for place, row in read_rows(file) if file.name in ("metadata.jsonl", "metadata.csv") else ():
            picture, text = file.parent / str(row.get("file_name")), row.get("text")
            if not (picture.is_file() and isinstance(text, str)):
                raise InputError(f'{place}: wanted {{"file_name": "dog.jpg", "text": "a dog"}} of an existing file')
            found.append((picture, text))
    Image.init()
    pictures = [file for file in files if file.suffix.lower() in Image.EXTENSION]
    texts = [(picture, picture.with_suffix(suffix)) for picture in pictures for suffix in (".txt", ".caption")]
    found += [(picture, read_text(text)) for picture, text in texts if text in files]
    captions = {os.path.relpath(picture, folder): text.strip() for picture, text in reversed(found)}
    if not captions:
        raise InputError(f"data.path={folder} is no folder with captions: a dog.txt beside dog.jpg, or metadata.jsonl")
    silent = sum(os.path.relpath(picture, folder) not in captions for picture in pictures)
    if silent:
        warnings.warn(f"data.path={folder}: {silent} pictures without a caption are left out", stacklevel=3)
    return captions
