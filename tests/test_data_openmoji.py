"""The OpenMoji stream: captions describe the pictures, and training never sees a concept that is held out."""

import hashlib
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.openmoji import BACKGROUNDS, OpenMoji, Scene, caption, load_library, sized
from errors import InputError


@pytest.fixture(scope="module")
def library():
    try:
        return load_library()
    except InputError as error:
        pytest.skip(str(error))


def test_the_scenes_of_a_seed_stay_the_same(library):
    """The shipped model was trained on them: a change of this number is another data set."""
    streams = [OpenMoji(split, seed=seed) for split in ("train", "heldout") for seed in (0, 3)]
    texts = "\n".join(stream.scene(i)[1] for stream in streams for i in range(200))
    assert hashlib.sha256(texts.encode()).hexdigest()[:16] == "68fae4848a927947"


def test_held_out_concepts_are_never_trained_on_but_each_word_is(library):
    assert all(library.concepts.values())
    bases, words, drawings = [], [], []
    for held_out, split in enumerate(("train", "heldout")):
        pictures = [p for p in library.pictures if p.held_out == held_out]
        bases.append({p.base for p in pictures})
        words.append({word for p in pictures for word in p.name.split()})
        drawings.append({zlib.crc32(library.drawings[p.index]) for p in pictures})
        assert {p.base for i in range(500) for p in OpenMoji(split).scene(i)[0].pictures} <= bases[-1]
    assert not bases[0] & bases[1] and 0.05 < len(bases[1]) / len(bases[0] | bases[1]) < 0.08
    assert words[1] <= words[0] and not drawings[0] & drawings[1]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31))
def test_a_caption_names_what_is_drawn(library, seed):
    scene = library.draw_scene(np.random.default_rng(seed), "train")
    text, pixels = caption(scene), library.draw(scene).permute(1, 2, 0).numpy()
    marked = (pixels != BACKGROUNDS[scene.background]).any(-1).mean()
    assert text.startswith("a line drawing of ") == scene.line
    assert text.endswith(f" {scene.background} background")
    for picture in scene.pictures:
        assert sized((picture.line_phrases if scene.line else picture.phrases)[0], scene.size) in text
        assert scene.line or not picture.skin or f", {picture.skin} skin tone" in text
    assert marked > 0.01 and (marked < 0.98 or scene.size == "large")


def test_a_caption_fits_into_forty_tokens_and_the_vocabulary_holds_them_all(library):
    encode = pytest.importorskip("open_clip").SimpleTokenizer().encode
    known = set(encode(" ".join({w for text in OpenMoji().vocabulary() for w in text.split()})))
    assert len(known) < 2000
    captions = [OpenMoji(split, seed=5).scene(i)[1] for split in ("train", "heldout") for i in range(100)]
    longest = max(library.pictures, key=lambda p: len(p.name.split()))
    captions.append(caption(Scene((longest, longest), "purple", line=True, stacked=True)))
    for tokens in map(encode, captions):
        assert len(tokens) + 2 < 40 and set(tokens) <= known
