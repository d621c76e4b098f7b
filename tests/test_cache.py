"""The tuning cache: it never changes results, and builds once."""

import os
import threading
import time

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.cache import TuningCache

STATE = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3, dtype=torch.bfloat16)}


class Build:
    """Gives a state, after some seconds, and counts how often it was asked."""

    def __init__(self, state=STATE, seconds=0):
        self.state, self.seconds, self.calls = state, seconds, 0

    def __call__(self):
        self.calls += 1
        time.sleep(self.seconds)
        return self.state, {"seconds": 1.5}


def test_an_entry_is_read_back_bit_by_bit(tmp_path):
    build = Build()
    for found in (False, True):
        tensors, notes, hit = TuningCache(dir=str(tmp_path / "new")).get({"seed": 0}, build)
        assert (hit, notes) == (found, {"seconds": 1.5})
        assert all(torch.equal(tensors[n], STATE[n]) and tensors[n].dtype == STATE[n].dtype for n in STATE)
    assert build.calls == 1


KEY = st.dictionaries(st.sampled_from("abc"), st.integers(0, 2) | st.text(max_size=2), max_size=3)


@given(KEY, KEY)
@settings(max_examples=30, deadline=None)
def test_only_an_equal_key_finds_an_entry(tmp_path_factory, one, other):
    cache = TuningCache(dir=str(tmp_path_factory.mktemp("cache")))
    cache.get(one, Build())
    assert cache.get(other, Build())[2] == (one == other)


def test_a_damaged_entry_is_built_again(tmp_path):
    cache = TuningCache(dir=str(tmp_path))
    cache.get({}, Build())
    (entry,) = tmp_path.glob("*.safetensors")
    entry.write_bytes(entry.read_bytes()[:20])
    assert [cache.get({}, Build())[2] for _ in range(2)] == [False, True]


def test_the_least_recently_used_entry_goes_first(tmp_path):
    state, moment = {"a": torch.zeros(250)}, time.time() - 100  # a little over 1000 bytes
    cache = TuningCache(dir=str(tmp_path), max_gb=2.5e-6)
    for i in range(2):
        before = set(tmp_path.glob("*.safetensors"))
        cache.get({"i": i}, Build(state))
        (new,) = set(tmp_path.glob("*.safetensors")) - before
        os.utime(new, (moment + i, moment + i))
    assert cache.get({"i": 0}, Build(state))[2]  # used now, so that entry 1 is the oldest
    (tmp_path / "mine.safetensors").write_bytes(bytes(3000))  # no entry: never touched, however large and old
    os.utime(tmp_path / "mine.safetensors", (0, 0))
    cache.get({"i": 2}, Build(state))
    assert len(list(tmp_path.glob("*.tuning.safetensors"))) == 2 and (tmp_path / "mine.safetensors").exists()
    assert [cache.get({"i": i}, Build(state))[2] for i in (0, 2)] == [True, True]


def test_of_two_that_want_one_entry_one_builds(tmp_path):
    build, found = Build(seconds=0.3), []
    get = lambda: found.append(TuningCache(dir=str(tmp_path)).get({}, build)[2])
    work = [threading.Thread(target=get) for _ in range(2)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert sorted(found) == [False, True] and build.calls == 1
