"""The runner over many tasks: whatever fails, stops or shares the work, in the end each task has been edited once, and
the results are those of one undisturbed run."""

import csv
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import hydra
import numpy as np
import pytest
from hydra.types import RunMode
from PIL import Image

import edit as command
import models
from data.tasks import Entry, Tasks
from errors import InputError
from reporting import benchmark
from reporting.outcome import explain
from reporting.sweep import read_jobs

ENTRIES = [Entry(f"t{i}", f"prompt {i}", category="ab"[i % 2]) for i in range(6)]
SETTINGS = {"method": {"eta": 0.6}, "task": {"path": "x", "limit": None}, "seed": 0, "device": "cpu"}


class Editor:
    """An edit that writes what the reporter would, with numbers that follow from the task; keeps what it was given."""

    def __init__(self, broken=(), error=lambda name: ValueError(f"{name} is broken")):
        self.broken, self.error, self.given = broken, error, []

    def __call__(self, entry, place, seed):
        self.given.append((entry.name, seed))
        if entry.name in self.broken:
            raise self.error(entry.name)
        number = int(entry.name[1:])
        edits = [
            {"file": f"edits/{eta}.png", "settings": {"eta": eta, "sample": 0}, "metrics": {"psnr": number + eta}}
            for eta in (0.25, 0.5)
        ]
        place.mkdir(exist_ok=True)
        report = {"method": "fake", "reconstruction": {"psnr": 30.0}, "edits": edits, "left_out": [{}, {}]}
        (place / "metrics.json").write_text(json.dumps(report))
        (place / "timings.json").write_text(json.dumps({"cost": {"seconds": 1.5}}))

    @property
    def names(self):
        return [name for name, _ in self.given]


def run(folder, editor=None, shard=None, settings=SETTINGS, entries=ENTRIES, seed=7):
    return benchmark.edit_all(Tasks(entries, shard=shard), folder, settings, seed, editor or Editor())


def read(folder):
    with open(folder / "results.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def same_files(a, b):
    for name in ("results.csv", "summary.json", "table.md"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.fixture
def whole(tmp_path, capsys):
    run(tmp_path / "whole")
    capsys.readouterr()
    return tmp_path / "whole"


def test_the_results_are_the_means_of_what_was_edited(whole):
    rows = read(whole)
    assert [(row["task"], row["eta"]) for row in rows[:3]] == [("t0", "0.25"), ("t0", "0.5"), ("t1", "0.25")]
    assert rows[2]["psnr"] == "1.25" and rows[2]["file"] == "t1/edits/0.25.png" and rows[2]["prompt"] == "prompt 1"
    summary = json.loads((whole / "summary.json").read_text())
    assert [summary[name] for name in ("tasks", "done", "failed", "waiting")] == [6, 6, 0, 0]
    first, second = summary["edits"]
    assert (first["settings"], second["settings"]) == ({"eta": 0.25}, {"eta": 0.5})
    assert first["overall"]["psnr"] == 2.5 + 0.25 and first["overall"]["edits"] == 6
    assert second["by_category"]["a"]["psnr"] == 2 + 0.5 and second["by_category"]["b"]["psnr"] == 3 + 0.5
    assert second["overall"]["reconstruction_psnr"] == 30 and second["overall"]["seconds"] == 1.5
    table = (whole / "table.md").read_text()
    assert table.count("| category |") == 2 and "| all " in table and "eta 0.25" in table


def test_a_failure_is_recorded_and_tried_again(tmp_path, whole, capsys):
    folder = tmp_path / "run"
    summary = run(folder, Editor({"t1", "t4"}))
    assert (summary["done"], summary["failed"], summary["waiting"]) == (4, 2, 0)
    failed = {row["task"]: row["error"] for row in read(folder) if row["error"]}
    assert failed == {name: f"ValueError: {name} is broken" for name in ("t1", "t4")}
    assert "Traceback" in (folder / "t1" / "error.txt").read_text()
    told = capsys.readouterr()
    assert f"hydra.run.dir={folder}" in told.out and "t4 failed: ValueError" in told.err
    again = Editor()
    run(folder, again)
    assert again.names == ["t1", "t4"] and not (folder / "t1" / "error.txt").exists()
    same_files(folder, whole)
    idle = Editor()
    run(folder, idle)
    assert idle.names == []


def test_a_task_that_has_changed_is_edited_again_and_its_old_result_is_not_reported(tmp_path, whole):
    """Names may be line numbers, so a list that was changed has other tasks of the same names."""
    changes = {"prompt": "other"}, {"source_prompt": "s"}, {"category": "c"}, {"image": Path("a")}, {"truth": Path("a")}
    changed = [ENTRIES[0], *(replace(entry, **change) for entry, change in zip(ENTRIES[1:], changes, strict=True))]
    assert benchmark.report(whole, changed)["waiting"] == 5
    assert {row["task"] for row in read(whole)} == {"t0"}
    again, idle = Editor({"t4"}), Editor()
    assert run(whole, again, entries=changed)["done"] == 5 and again.names == ["t1", "t2", "t3", "t4", "t5"]
    assert read(whole)[2]["prompt"] == "other"
    assert run(whole, idle, entries=changed)["done"] == 6 and idle.names == ["t4"]
    for path in whole.glob("*/result.json"):  # rows may come without pictures
        rows = json.loads(path.read_text())
        path.write_text(json.dumps([{k: v for k, v in row.items() if k != "pictures"} for row in rows]))
    assert benchmark.report(whole, changed)["done"] == 6


def test_tasks_never_tried_come_before_those_that_failed(tmp_path):
    folder, broken = tmp_path / "run", {"t0", "t1", "t2"}
    for _ in range(2):
        editor = Editor(broken, lambda name: ValueError("too large"))
        with pytest.raises(InputError, match="3 tasks in a row"):
            run(folder, editor)
    assert editor.names == ["t3", "t4", "t5", "t0", "t1", "t2"]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["done"], summary["failed"]) == (3, 3)
    for group in summary["edits"]:
        assert (group["overall"]["edits"], group["overall"]["failed"]) == (3, 3)
        assert [group["by_category"][c]["failed"] for c in "ab"] == [2, 1]
    page = (folder / "index.html").read_text()
    assert page.count('data-label="fake, eta 0.25" data-success="failed"') == 3


def test_a_number_that_is_not_finite_is_left_out_with_the_reason(tmp_path):
    class Diverging(Editor):
        def __call__(self, entry, place, seed):
            super().__call__(entry, place, seed)
            report = json.loads((place / "metrics.json").read_text())
            report["edits"][0]["metrics"] |= {"drift": float("nan")}
            report["left_out"][1] = {"drift": "never asked"}
            (place / "metrics.json").write_text(json.dumps(report))

    run(tmp_path, Diverging())
    first, second = json.loads((tmp_path / "t0" / "result.json").read_text())
    assert first["left_out"] == {"drift": "it was nan"} and second["left_out"] == {"drift": "never asked"}
    assert "drift" not in first["metrics"] and "NaN" not in (tmp_path / "index.html").read_text()


def test_many_rows_are_reported_at_once(tmp_path):
    """In time that grows with their number, not with its square."""
    entries = [Entry(f"t{i}", "a") for i in range(2500)]
    for entry in entries:
        (tmp_path / entry.name).mkdir()
        row = {"task": entry.name, "category": "", "method": "m", "settings": {}, "metrics": {}, "left_out": {}}
        row |= {"sample": 0, "file": f"{entry.name}/a.png", "prompt": "a", "source_prompt": ""}
        rows = [row | {"settings": {"eta": eta}} for eta in (0.1, 0.2)]
        (tmp_path / entry.name / "result.json").write_text(json.dumps(rows))
    start = time.process_time()
    benchmark.report(tmp_path, entries)
    assert time.process_time() - start < 15


def test_in_a_sweep_one_goes_on_with_its_own_folder(tmp_path, monkeypatch, capsys):
    config = SimpleNamespace(mode=RunMode.MULTIRUN, sweep=SimpleNamespace(dir="runs/sweep"))
    monkeypatch.setattr(benchmark.HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(benchmark.HydraConfig, "get", lambda: config)
    run(tmp_path, Editor({"t1"}))
    assert capsys.readouterr().out.endswith("goes on from here with hydra.sweep.dir=runs/sweep\n")


def test_ctrl_c_keeps_what_is_finished(tmp_path, whole):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(folder, Editor({"t3"}, lambda name: KeyboardInterrupt()))
    assert {row["task"] for row in read(folder)} == {"t0", "t1", "t2"}
    assert json.loads((folder / "summary.json").read_text())["waiting"] == 3
    rest = Editor()
    run(folder, rest)
    assert rest.names == ["t3", "t4", "t5"]
    same_files(folder, whole)


def test_a_task_that_was_killed_is_edited_again(tmp_path, whole):
    """Killed between the reporter's last file and the result: the result alone says that a task is finished."""
    (whole / "t2" / "result.json").unlink()
    before = (whole / "results.csv").read_bytes()
    rest = Editor()
    rest.__class__ = type("Again", (Editor,), {"__call__": lambda self, entry, *_: self.given.append((entry.name, 0))})
    run(whole, rest)  # its files are all there
    assert rest.names == ["t2"] and (whole / "results.csv").read_bytes() == before


def test_shares_of_one_folder_merge(tmp_path, whole, capsys):
    folder, editors = tmp_path / "run", [Editor() for _ in range(3)]
    for i, editor in enumerate(editors):
        run(folder, editor, shard=f"{i}/3")
        told = capsys.readouterr().out
        assert ("| all " in told) == (i == 2)  # the table of all tasks, when all are done
        assert "goes on" not in told  # this share is done
    given = sorted(task for editor in editors for task in editor.given)
    assert given == [(f"t{i}", benchmark.task_seed(7, f"t{i}")) for i in range(6)]
    same_files(folder, whole)


def test_whoever_writes_last_has_read_everything(tmp_path, whole, monkeypatch):
    """Another process finishes t5 while this one is writing its report without it."""
    folder, write = tmp_path / "run", benchmark.write_csv
    run(folder, entries=ENTRIES[:5])

    def meanwhile(path, rows):
        write(path, rows)
        monkeypatch.setattr(benchmark, "write_csv", write)
        benchmark.attempt(ENTRIES[5], folder / "t5", benchmark.task_seed(7, "t5"), Editor())

    monkeypatch.setattr(benchmark, "write_csv", meanwhile)
    assert benchmark.report(folder, ENTRIES)["done"] == 6
    same_files(folder, whole)


def test_while_others_work_the_report_is_written_once_more(tmp_path, monkeypatch):
    written, write = [], benchmark.write_csv

    def meanwhile(path, rows):
        write(path, rows)
        entry = ENTRIES[len(written)]
        benchmark.attempt(entry, tmp_path / entry.name, 0, Editor())
        written.append(entry)

    monkeypatch.setattr(benchmark, "write_csv", meanwhile)
    tmp_path.joinpath("t0").mkdir()
    assert benchmark.report(tmp_path, ENTRIES)["done"] == 1  # whose own report may have been overwritten
    assert len(written) == 2


def test_a_sweep_takes_the_tasks_that_its_list_still_has(tmp_path):
    job = tmp_path / "0"
    (job / ".hydra").mkdir(parents=True)
    (job / ".hydra" / "overrides.yaml").write_text("[]")
    run(job)
    assert len(read_jobs(tmp_path)) == 12
    run(job, entries=ENTRIES[1:4])
    assert {row.settings["task"] for row in read_jobs(tmp_path)} == {"t1", "t2", "t3"}


def test_other_settings_in_the_same_folder_are_refused(whole):
    for change, told in (
        ({"method": {"eta": 0.7}}, r"method.eta was 0.6, is 0.7"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"sampler": {"steps": 5}}, "sampler.steps was None, is 5"),
        ({"task": {"path": "y"}}, "task.path was x, is y"),
    ):
        with pytest.raises(InputError, match=f"{told}.*hydra.run.dir"):
            run(whole, settings=SETTINGS | change)
    same = {"device": "cuda", "task": {"path": "x", "limit": 3, "shard": "0/2"}, "logger": {"mode": "online"}}
    run(whole, settings=SETTINGS | same)  # where it runs, what is chosen and who is told make no other results


def test_changed_code_is_noted(whole, monkeypatch, recwarn):
    run(whole)
    assert not recwarn
    monkeypatch.setattr(benchmark, "code_fingerprint", lambda: "other")
    with pytest.warns(UserWarning, match="the code has changed"):
        run(whole)


def test_a_folder_without_results_may_be_begun_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Editor({"t0"}, lambda name: KeyboardInterrupt()))
    run(tmp_path, settings=SETTINGS | {"seed": 1})


def test_the_same_error_again_and_again_ends_the_run(tmp_path):
    editor = Editor({f"t{i}" for i in range(1, 6)}, lambda name: RuntimeError("the GPU is gone"))
    with pytest.raises(InputError, match=r"3 tasks in a row.*the GPU is gone"):
        run(tmp_path, editor)
    assert editor.names == ["t0", "t1", "t2", "t3"]
    assert json.loads((tmp_path / "summary.json").read_text())["failed"] == 3
    assert (tmp_path / "table.md").read_text().endswith("\n2 of 6 tasks are waiting.\n")


def test_a_run_in_which_everything_failed_is_an_error(tmp_path):
    with pytest.raises(InputError, match="all 6 tasks failed"):
        run(tmp_path, Editor({entry.name for entry in ENTRIES}))


def test_seeds_are_each_tasks_own_and_stay():
    assert benchmark.task_seed(0, "colour_00") == 320021889
    seeds = {benchmark.task_seed(seed, f"t{i}") for seed in range(30) for i in range(30)}
    assert len(seeds) == 900 and all(0 <= seed < 2**31 for seed in seeds)


# With edit.py.


@pytest.fixture(scope="module")
def user(tmp_path_factory, tiny_model):
    """A tiny checkpoint, and a list of three edits of which one is of a broken picture."""
    folder = tmp_path_factory.mktemp("user")
    models.save(tiny_model, folder / "tiny")
    generator = np.random.default_rng(0)
    for name in ("dog", "truth", "cat"):
        Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    lines = [
        {"image": "dog.png", "prompt": "a red heart", "source_prompt": "a heart", "truth": "truth.png", "name": "dog"},
        {"image": "broken.png", "prompt": "a cat", "name": "broken"},
        {"image": "cat.png", "prompt": "a red cat", "category": "colour", "name": "cat"},
    ]
    (folder / "edits.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def edit(user, folder, *settings):
    with hydra.initialize_config_dir(str(Path(command.__file__).parent / "conf"), version_base="1.3"):
        base = [f"model.weights={user / 'tiny'}", "method=direct_inversion", "sampler.steps=2", "cache.enabled=false"]
        command.edit(hydra.compose("edit", [*base, "logger.mode=disabled", *settings]), folder, "direct_inversion")


def test_a_list_is_edited_like_its_pictures_one_by_one(user, tmp_path, monkeypatch, capsys):
    """By two processes of torchrun, of which the second goes on where it failed; the settings use noise."""
    folder, noisy = tmp_path / "run", ["method.diversity=0.5"]
    listed = ["task=folder", f"task.path={user / 'edits.jsonl'}", *noisy]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        if rank == "1":  # which has the broken one alone, and waits for no other
            edit(user, folder, *listed)
            assert "0 of 3 tasks done, 1 failed" in capsys.readouterr().out
    edit(user, folder, *listed)
    rows = {row["task"]: row for row in read(folder)}
    assert "broken.png" in rows["broken"]["error"] and "\n" not in rows["broken"]["error"]
    assert rows["dog"]["psnr_to_truth"] and not rows["cat"]["psnr_to_truth"] and rows["cat"]["category"] == "colour"
    assert (folder / "dog" / "truth.png").exists() and (folder / "dog" / "sheet.png").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    one = tmp_path / "one"
    edit(user, one, *noisy, f"image={user / 'cat.png'}", "prompt=a red cat", f"seed={rows['cat']['seed']}")
    file = rows["cat"]["file"].removeprefix("cat/")
    assert (one / file).read_bytes() == (folder / "cat" / file).read_bytes()
    assert rows["cat"]["seed"] != rows["dog"]["seed"]


def test_a_senseless_size_fails_no_task(user, tmp_path):
    with pytest.raises(InputError, match="size=31"):
        edit(user, tmp_path / "run", "task=folder", f"task.path={user / 'edits.jsonl'}", "size=31")
    assert not (tmp_path / "run").exists()


def test_the_quick_list_is_the_first_of_the_whole_one():
    with hydra.initialize_config_dir(str(Path(command.__file__).parent / "conf"), version_base="1.3"):
        quick, whole = (
            hydra.compose("edit", [f"task={name}"]).task for name in ("openmoji_edits_quick", "openmoji_edits")
        )
        assert len(hydra.utils.instantiate(quick).entries) == 40 and len(hydra.utils.instantiate(whole).entries) == 300
        third = hydra.compose("edit", ["task=openmoji_edits", "task.shard=2/3", "task.categories=[pose,style]"]).task
        share = [entry.name for entry in hydra.utils.instantiate(third).share]
        assert len(share) == 20 and share[:2] == ["style_01", "pose_02"]
        for name in ("pie_bench", "tedbench", "folder"):
            with pytest.raises(Exception) as error:
                hydra.utils.instantiate(hydra.compose("edit", [f"task={name}"]).task)
            assert "task.path is missing" in explain(error.value)


def test_torchrun_needs_a_folder_that_is_named(tmp_path):
    done = subprocess.run(
        [sys.executable, command.__file__], cwd=tmp_path, env=os.environ | {"WORLD_SIZE": "2", "RANK": "0"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "hydra.run.dir=" in done.stderr
