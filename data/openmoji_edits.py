"""Fixed lists of edits of OpenMoji pictures whose true result is known, in ten categories.

    attribute    another state or kind of the same thing           identity     skin tone, hair, gender, role
    background, colour, expression, object, pose, position, size   style        as a line drawing

`openmoji_edits_v1` has 300 edits of concepts that training never shows: it compares methods. `openmoji_edits_tuning`
has 60 edits of trained concepts: it is for choosing settings. `data/examples` holds a line for each edit (two scenes
and their captions), and a picture with their drawings at 64 x 64, so a model of that size needs nothing installed. At
other sizes `data/openmoji.py` draws them. The lists stay as they are; a better one would be a v2.
"""

import json

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from data.openmoji import Library, Scene, load_library
from data.tasks import EditTask, Entry, Tasks
from files import CLONE

SIDE = 64  # of the drawings in the stored picture: rows of input and truth side by side


class OpenMojiEdits(Tasks):
    """A list of `data/examples` by its `name`. The mask is where input and truth differ."""

    def __init__(self, name: str = "openmoji_edits_v1", **choice):
        file = CLONE / "data" / "examples" / f"{name}.jsonl"
        edits = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        self.edits = {edit["name"]: edit for edit in edits}
        pixels = torch.from_numpy(np.array(Image.open(file.with_suffix(".png")).convert("RGB")))
        pairs = rearrange(pixels, "(i h) (j pair w) c -> (i j) pair c h w", h=SIDE, w=SIDE, pair=2)
        self.drawings = dict(zip(self.edits, pairs, strict=True))  # input and truth of each
        super().__init__([Entry(e["name"], e["prompt"], e["source_prompt"], e["category"]) for e in edits], **choice)

    def load(self, entry: Entry, size: int, multiple: int = 1) -> EditTask:
        pair = self.drawings[entry.name]
        if size != SIDE:
            library, edit = load_library(size), self.edits[entry.name]
            pair = torch.stack([library.draw(read_scene(edit[key], library)) for key in ("source", "target")])
        image, truth = (pair.float() / 127.5 - 1).split(1)
        mask = (image != truth).any(1, keepdim=True).float()
        return EditTask(image, entry.prompt, entry.source_prompt, entry.name, mask, truth, entry.category)


def read_scene(stored: dict, library: Library) -> Scene:
    """A scene from the fields that it does not share with a plain one, its pictures by their code points."""
    by_code = {picture.code: picture for picture in library.pictures}
    return Scene(**stored | {"pictures": tuple(by_code[code] for code in stored["pictures"])})
