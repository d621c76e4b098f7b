"""The runner: an edit's cost, files and rows; each task is edited once, although some fail, runs stop or share it."""

import json
import math
from dataclasses import dataclass, replace

import pytest
import torch
from PIL import Image

from data.tasks import Entry, Tasks
from errors import InputError
from evaluation import report, runner
from evaluation.cache import TuningCache
from evaluation.metrics import Metrics
from evaluation.runner import Editor
from evaluation.wandb_log import WandbLogger
from methods.base import RECONSTRUCTION, Method
from methods.imagic import Imagic
from methods.null_text import NullText
from methods.prompt_to_prompt import PromptToPrompt
from samplers import Sampler


def editor(model, method, cache=None, logger=None, **settings):
    cache, logger = cache or TuningCache(enabled=False), logger or WandbLogger("disabled")
    return Editor(model, method, "mine", Metrics(), cache, logger, fingerprint="f", **settings)


# One task.


@dataclass
class Tuned(Method):
    """Tunes for 10 `seconds` and 3 evaluations, edits for 1 and 1, around a reconstruction of 100 and 5."""

    seconds: list

    def edit(self, model, task, z, run):
        def work(seconds, evaluations):
            self.seconds[0] += seconds
            model.predict(torch.zeros(evaluations, 4, 8, 8), 0, model.encode_text([""]).expand(evaluations))

        def build():
            work(10, 3)
            return {"a": torch.ones(1)}

        run.cached("tuning", {}, build)
        work(1, 1)
        run.metrics["own"] = 1.0
        yield {"eta": 0.5}, z
        work(100, 5)
        yield RECONSTRUCTION, z
        work(1, 1)
        run.metrics["own"] = 2.0
        run.metrics["infinite"] = math.inf
        yield {"eta": 1.0, "by": "a/b c"}, z


def test_an_edit_costs_its_tuning_wherever_it_was_done_and_no_reconstruction(tmp_path, tiny_model, task, monkeypatch):
    """Into a new cache, from the cache, and without one. The cache's own work, 1000 seconds each, costs nothing."""
    clock, get = [0.0], TuningCache.get
    monkeypatch.setattr(runner, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(runner, "peak_memory", lambda device: 2.0)

    def slow(self, *arguments):
        clock[0] += 1000
        return get(self, *arguments)

    monkeypatch.setattr(TuningCache, "get", slow)
    for settings in ({"dir": str(tmp_path)}, {"dir": str(tmp_path)}, {"enabled": False}):
        rows, _ = editor(tiny_model, Tuned(clock), TuningCache(**settings)).edit_task(task, tmp_path / "run", 0)
        assert [(row["seconds"], row["evaluations"], row["peak_memory_gb"]) for row in rows] == [(11, 4, 2), (12, 5, 2)]
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_a_tuning_is_reused_for_the_same_picture_and_settings_only(tmp_path, tiny_model, task):
    cache = TuningCache(dir=str(tmp_path / "cache"))
    other = replace(task, image=-task.image)
    for its, settings, entries in ((task, {}, 1), (task, {}, 1), (other, {}, 2), (task, {"kernels": ["sdpa"]}, 3)):
        editor(tiny_model, Tuned([0.0]), cache, **settings).edit_task(its, tmp_path / "run", 0)
        assert len(list(cache.folder.glob("*.safetensors"))) == entries


def test_the_code_of_a_tuning_is_not_that_of_other_methods():
    """A new method file changes no tuning of another."""
    for method, own, others in (
        (PromptToPrompt(Sampler(), NullText()), {"prompt_to_prompt.py", "null_text.py"}, {"imagic.py", "sdedit.py"}),
        (Imagic(Sampler()), {"imagic.py"}, {"inversion.py", "sdedit.py", "prompt_to_prompt.py"}),
    ):
        files = {file.name for file in runner.code_of(method)}
        assert {"unet.py", "ddim.py", "base.py", *own} < files and not others & files


def test_rows_are_flat_and_name_their_files(tmp_path, tiny_model, task):
    task = replace(task, truth=task.image)
    rows, _ = editor(tiny_model, Tuned([0.0])).edit_task(task, tmp_path, 3)
    assert [row["file"].name for row in rows] == ["00_eta-0.5.png", "01_eta-1_by-a-b-c.png"]
    first, second = rows
    assert first.items() >= {"method": "mine", "seed": 3, "sample": 0}.items()
    assert (first["edit.eta"], second["edit.eta"], second["edit.by"]) == (0.5, 1.0, "a/b c")
    assert (first["own"], second["own"]) == (1.0, 2.0)  # each edit has the numbers that were there with it
    assert "infinite" not in second
    assert first["edit_source_cosine"] == pytest.approx(1) and first["reconstruction_psnr"] == first["psnr_to_input"]
    assert json.dumps(rows, allow_nan=False, default=str)
    for name in ("file", "input", "reconstruction", "truth"):
        assert Image.open(first[name]).size == (32, 32)


# All tasks.

ENTRIES = [Entry(f"t{i}", f"prompt {i}", category="ab"[i % 2]) for i in range(6)]
SETTINGS = {"method": {"eta": 0.6}, "task": {"path": "x", "limit": None}, "seed": 0, "device": "cpu"}


class Edit:
    """Stands in for an edit: counts its tasks, and fails for the `broken` ones."""

    def __init__(self, broken=(), error=ValueError):
        self.broken, self.error, self.given = broken, error, []

    def __call__(self, entry, place, seed):
        self.given.append((entry.name, seed))
        if entry.name in self.broken:
            raise self.error(f"{entry.name} is broken")
        row = {"method": "m"}
        edits = [{"sample": i, "psnr": int(entry.name[1:]) + i / 2, "file": place / f"{i}.png"} for i in range(2)]
        return [row | edit for edit in edits], {}

    @property
    def names(self):
        return [name for name, _ in self.given]


@pytest.fixture
def reports(monkeypatch):
    """The arguments of `report.write`, which does nothing: (tasks, rows)."""
    calls = []
    monkeypatch.setattr(report, "write", lambda folder, rows, tasks, curves: calls.append((tasks, len(rows))))
    return calls


def run(folder, edit=None, shard=None, settings=SETTINGS, entries=ENTRIES, **more):
    return runner.edit_all(Tasks(entries, shard=shard), folder, edit or Edit(), 7, settings, **more)


def test_every_task_has_its_rows_and_a_seed_of_its_own(tmp_path, reports):
    rows = run(tmp_path, edit := Edit())
    assert [(row["task"], row["sample"]) for row in rows[:3]] == [("t0", 0), ("t0", 1), ("t1", 0)]
    assert rows[2].items() >= {"file": "t1/0.png", "category": "b", "prompt": "prompt 1"}.items()
    assert edit.given == [(f"t{i}", runner.task_seed(7, f"t{i}")) for i in range(6)] and reports == [(6, 12)]
    assert [run(tmp_path / "shared", shard=f"{i}/3") for i in range(3)][-1] == rows and reports[-1] == (6, 12)
    assert runner.task_seed(0, "colour_00") == 320021889  # for ever, so that results can be made again


def test_a_failure_is_a_row_and_tried_again(tmp_path, reports, capsys):
    failed = [row for row in run(tmp_path, Edit({"t1", "t4"})) if "error" in row]
    assert [row["task"] for row in failed] == ["t1", "t4"] and reports == [(6, 10)]
    told = capsys.readouterr()
    assert "t4 failed" in told.err and "t4 is broken" in told.err and f"hydra.run.dir={tmp_path}" in told.out
    assert "Traceback" in (tmp_path / "t1" / "error.txt").read_text()
    rows = run(tmp_path, again := Edit(), entries=[*ENTRIES, Entry("t6", "new")])
    assert again.names == ["t1", "t4", "t6"] and len(rows) == 14 and not any("error" in row for row in rows)
    assert list(dict.fromkeys(row["task"] for row in rows)) == [f"t{i}" for i in range(7)]
    assert "hydra.run.dir" not in capsys.readouterr().out


def test_ctrl_c_loses_only_the_task_at_work(tmp_path, reports):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Edit({"t3"}, KeyboardInterrupt))
    assert reports == [(6, 6)]
    rest = Edit()
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"task": "t3", "psn\n')  # and a process that is killed, less than the line that it writes
    assert len(run(tmp_path, rest)) == 12 and rest.names == ["t3", "t4", "t5"]


def test_a_task_that_has_changed_is_edited_again(tmp_path, reports):
    """Names may be line numbers, so a list that was changed has other tasks of the same names."""
    picture, mask = tmp_path / "a.png", tmp_path / "b.png"
    (tmp_path / "t1" / "edits").mkdir(parents=True)
    for file in (picture, mask, tmp_path / "t1" / "edits" / "a.png"):
        Image.new("RGB", (8, 8)).save(file)
    entries = [replace(entry, image=picture) for entry in ENTRIES]
    run(tmp_path, entries=entries)
    changes = {"prompt": "other"}, {"blend_word": "a b"}, {"category": "c"}, {"mask": mask}, {"truth": mask}
    changed = [entries[0], *(replace(entry, **change) for entry, change in zip(entries[1:], changes, strict=True))]
    rows = run(tmp_path, again := Edit(), entries=changed)
    assert again.names == ["t1", "t2", "t3", "t4", "t5"] and len(rows) == 12 and rows[2]["prompt"] == "other"
    Image.new("RGB", (8, 8), "red").save(mask)  # another picture of the same name
    run(tmp_path, again := Edit(), entries=changed)
    assert again.names == ["t4", "t5"]
    entries[1] = replace(entries[1], mask=tmp_path / "t1" / "edits" / "a.png")  # which the work would remove
    with pytest.raises(InputError, match=r"edits/a\.png"):
        run(tmp_path, entries=entries)


def test_a_folder_is_not_continued_with_other_settings(tmp_path, reports):
    run(tmp_path)
    for change in ({"method": {"eta": 0.7}}, {"seed": 1}, {"sampler": {"steps": 5}}, {"weights": "other"}):
        with pytest.raises(InputError, match="other settings"):
            run(tmp_path, settings=SETTINGS | change)
    same = {"device": "cuda", "task": {"path": "x", "limit": 3, "shard": "0/2"}, "logger": {"mode": "online"}}
    run(tmp_path, settings=SETTINGS | same)  # where it runs, and which tasks are chosen, make no other results


def test_the_objective_is_a_mean_over_edits(tmp_path, reports):
    rows = run(tmp_path)
    assert runner.objective("psnr", rows) == 2.75 and runner.objective(None, rows) is None
    assert runner.objective(["psnr", "sample"], rows) == [2.75, 0.5]
    for name, others, word in (("lpips", [], "lpips"), ("psnr", [{"task": "t9", "error": "x"}], "tasks failed")):
        with pytest.raises(InputError, match=word):
            runner.objective(name, rows + others)
