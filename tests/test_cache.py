"""The tuning cache: it never changes results, and builds once."""

import os
import threading
import time

import torch

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


def found(cache, key, state=STATE):
    """Whether the cache has the entry."""
    cache.get(key, build := Build(state))
    return not build.calls


def test_an_entry_is_read_back_bit_by_bit(tmp_path):
    build = Build()
    for _ in range(2):
        tensors, notes = TuningCache(dir=str(tmp_path / "new")).get({"seed": 0}, build)
        assert notes == {"seconds": 1.5} and build.calls == 1
        assert all(torch.equal(tensors[n], STATE[n]) and tensors[n].dtype == STATE[n].dtype for n in STATE)
    assert not found(TuningCache(dir=str(tmp_path / "new")), {"seed": 1})


def test_a_damaged_entry_is_built_again(tmp_path):
    cache = TuningCache(dir=str(tmp_path))
    cache.get({}, Build())
    (entry,) = tmp_path.glob("*.safetensors")
    entry.write_bytes(entry.read_bytes()[:20])
    assert [found(cache, {}) for _ in range(2)] == [False, True]


def test_the_least_recently_used_entry_goes_first(tmp_path):
    state, moment = {"a": torch.zeros(250)}, time.time() - 100  # a little over 1000 bytes
    cache = TuningCache(dir=str(tmp_path), max_gb=2.5e-6)
    for i in range(2):
        before = set(tmp_path.glob("*.safetensors"))
        cache.get({"i": i}, Build(state))
        (new,) = set(tmp_path.glob("*.safetensors")) - before
        os.utime(new, (moment + i, moment + i))
    assert found(cache, {"i": 0}, state)  # used now, so that entry 1 is the oldest
    (tmp_path / "mine.safetensors").write_bytes(bytes(3000))  # no entry: never touched, however large and old
    os.utime(tmp_path / "mine.safetensors", (0, 0))
    cache.get({"i": 2}, Build(state))
    assert len(list(tmp_path.glob("*.tuning.safetensors"))) == 2 and (tmp_path / "mine.safetensors").exists()
    assert [found(cache, {"i": i}, state) for i in (0, 2)] == [True, True]


def test_of_two_that_want_one_entry_one_builds(tmp_path):
    build = Build(seconds=0.3)
    work = [threading.Thread(target=TuningCache(dir=str(tmp_path)).get, args=({}, build)) for _ in range(2)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert build.calls == 1
