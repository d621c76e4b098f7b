"""The cache gives back exactly what was built, or builds it; files come whole; sweeps are read back from folders."""

import csv
import errno
import json
import os
import resource
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont

from data.tasks import EditTask
from errors import InputError
from files import whole_file, whole_folder
from methods.base import Edit, EditResult
from reporting.cache import TuningCache, code_fingerprint
from reporting.logger import WandbLogger
from reporting.outcome import explain, literal, unquoted
from reporting.plots import plot_curves, plot_tradeoff
from reporting.reporter import RunReporter
from reporting.sheet import Cell, contact_sheet, grid, wrap
from reporting.sweep import Row, Summary, lay_out, read_jobs, swept, write_summary

STATE = {"e": torch.arange(6.0).reshape(2, 3), "scale": torch.tensor(2.5), "half": torch.ones(3).bfloat16()}


def counted(cache, key, state=STATE):
    """The state from the cache, and how often it was built."""
    built = []
    tensors, found = cache.get(key, lambda: built.append(1) or state)
    assert found == (not built)
    return tensors, len(built)


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


# The tuning cache.


def test_cache_builds_once_and_returns_the_same(tmp_path):
    cache = TuningCache(dir=tmp_path / "tuning")
    first, built = counted(cache, {"prompt": "a", "steps": 3})
    again, rebuilt = counted(TuningCache(dir=tmp_path / "tuning"), {"steps": 3, "prompt": "a"})
    assert (built, rebuilt) == (1, 0) and same(first, again) and same(again, STATE)
    assert counted(cache, {"prompt": "b", "steps": 3})[1] == 1
    assert counted(TuningCache(enabled=False, dir=tmp_path / "tuning"), {"prompt": "a", "steps": 3})[1] == 1


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied", "replaced"])
def test_a_damaged_entry_is_built_again_with_a_warning(tmp_path, caplog, damage):
    cache = TuningCache(dir=tmp_path)
    counted(cache, {"k": 1})
    (entry,) = tmp_path.glob("*.safetensors")
    data = entry.read_bytes()
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    entry.write_bytes({"truncated": data[:-9], "flipped": flipped, "emptied": b"", "replaced": b"x" * 99}[damage])
    tensors, built = counted(cache, {"k": 1})
    assert built == 1 and same(tensors, STATE) and "damaged" in caplog.text
    assert counted(cache, {"k": 1})[1] == 0


def test_least_recently_used_entries_go_first_and_then_this_process_latest(tmp_path, monkeypatch, caplog):
    state = {"x": torch.zeros(25_000)}  # 100 kB
    cache = TuningCache(dir=tmp_path, max_gb=350e3 / 1e9)
    for i in range(3):
        counted(cache, {"i": i}, state)
        for file in tmp_path.glob("*.safetensors"):
            os.utime(file, (file.stat().st_atime, file.stat().st_mtime - 10))
    monkeypatch.setattr("reporting.cache.STARTED", time.time() - 5)
    assert counted(cache, {"i": 0}, state)[1] == 0  # used just now, so 1 is the oldest
    counted(cache, {"i": 3}, state)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3 and not caplog.text
    for i in (4, 5):  # 0, 3 and 4 are of this process
        time.sleep(0.02)
        counted(cache, {"i": i}, state)
    assert caplog.text.count("not kept") == 1
    counted(cache, {"larger": 1}, {"x": torch.zeros(50_000)})  # than any of them, so none makes room for it
    assert [counted(cache, {"i": i}, state)[1] for i in (0, 3, 5)] == [0, 0, 0]
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_a_sweep_beyond_the_limit_tunes_once_for_several_edits_in_a_row(tmp_path):
    cache = TuningCache(dir=tmp_path, max_gb=350e3 / 1e9)
    state = {"x": torch.zeros(25_000)}
    assert [counted(cache, {"prompt": i // 3}, state)[1] for i in range(18)] == [1, 0, 0] * 6


def test_a_state_beyond_the_limit_is_not_kept(tmp_path, caplog):
    cache = TuningCache(dir=tmp_path, max_gb=1e-9)
    assert counted(cache, {})[1] == counted(cache, {})[1] == 1
    assert "not kept" in caplog.text and not list(tmp_path.glob("*.safetensors"))


def test_a_cache_that_cannot_be_used_costs_no_run(tmp_path, caplog, monkeypatch):
    (tmp_path / "file").write_text("")
    assert counted(TuningCache(dir=tmp_path / "file" / "tuning"), {})[1] == 1
    assert "cannot be used" in caplog.text

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("reporting.cache.save_file", full)
    assert counted(TuningCache(dir=tmp_path / "tuning"), {})[1] == 1
    assert "No space left" in caplog.text and not list((tmp_path / "tuning").glob("*safetensors*"))


def test_jobs_at_once_tune_once(tmp_path):
    """flock excludes open files, so threads with a cache each stand for processes."""
    built, got = [], []

    def build():
        built.append(1)
        time.sleep(0.3)
        return STATE

    def job():
        got.append(TuningCache(dir=tmp_path).get({"k": 1}, build)[0])

    threads = [threading.Thread(target=job) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1 and len(got) == 4 and all(same(g, STATE) for g in got)


def test_a_folder_that_gives_no_lock_costs_no_run(tmp_path, monkeypatch):
    def refuse(path, mode="r", **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr("reporting.cache.open", refuse, raising=False)
    assert [counted(TuningCache(dir=tmp_path), {"k": 1})[1] for _ in range(2)] == [1, 0]


def test_cache_settings_are_checked():
    for size in (0, "abc", float("nan"), float("inf"), None):
        with pytest.raises(InputError, match="max_gb"):
            TuningCache(max_gb=size)
    with pytest.raises(InputError, match="true or false"):
        TuningCache(enabled="no")
    assert code_fingerprint() == code_fingerprint()


# Files.


def test_files_are_whole_or_untouched(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    (tmp_path / "edits").mkdir()
    (tmp_path / "edits" / "old.png").write_text("old")
    with pytest.raises(OSError), whole_folder(tmp_path) as folder:
        (folder / "a.txt").write_text("new")
        (folder / "edits").mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError), whole_file(tmp_path / "a.txt") as file:
        file.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (tmp_path / "a.txt").read_text() == "old" and (tmp_path / "edits" / "old.png").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "edits"]

    with whole_folder(tmp_path) as folder:
        (folder / "a.txt").write_text("new")
        (folder / "edits").mkdir()
        (folder / "edits" / "new.png").write_text("new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert [p.name for p in (tmp_path / "edits").iterdir()] == ["new.png"]  # the old edits are not mixed in
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "edits"]


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_writes_is_not(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with whole_file(tmp_path / "a.txt") as mine:
        mine.write_text("whole")
    name = mine.name.replace(str(os.getpid()), "{}")
    dead, live, other = (tmp_path / name.format(pid) for pid in (gone.pid, 1, f"{gone.pid}x"))
    elsewhere = tmp_path / f".a.txt.another-machine.{gone.pid}.partial"
    for file in (dead, live, other, elsewhere):
        file.write_text("half")
    with whole_file(tmp_path / "a.txt") as file:
        file.write_text("new")
    assert {p.name for p in tmp_path.iterdir()} == {"a.txt", live.name, other.name, elsewhere.name}


def test_a_finished_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "usual").touch()
    with whole_file(tmp_path / "whole") as file:
        file.unlink()
        os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))  # as safetensors does
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "usual").stat().st_mode


# Sheets and plots.


@given(st.text(st.characters(codec="utf-8"), max_size=40), st.integers(30, 300))
@settings(max_examples=15, deadline=None)
def test_wrapped_lines_fit_and_lose_nothing(text, width):
    font = ImageFont.load_default(15)
    lines = wrap(text, font, width)
    assert "".join(lines).replace(" ", "") == "".join(text.split())
    assert all(font.getlength(line) <= width or len(line) == 1 for line in lines)


def test_contact_sheet_shows_every_picture_enlarged():
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255), (128, 0, 0)]
    cells = [Cell(Image.new("RGB", (64, 64), color), ["caption"]) for color in colors]
    for count in (1, 4, 5):
        sheet = contact_sheet(["a title"], cells[:2], cells[2 : 2 + count])
        areas = {color: n for n, color in sheet.getcolors(1 << 20)}
        assert all(areas[color] == 192 * 192 for color in colors[: 2 + count])
    one, two = (contact_sheet(["a title"], cells[:2], cells[2:]) for _ in range(2))
    assert one.tobytes() == two.tobytes()


def test_grid_stands_empty_and_failed_cells():
    sheet = grid(["t"], [[Cell(None, ["failed"]), None], [None, None]], ["row", "other"], ["a", "b"])
    assert (235, 235, 235) in {color for _, color in sheet.getcolors(1 << 20)}


def test_a_sheet_may_show_more_files_than_can_be_open(tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limits[1]))
    try:
        assert grid(["t"], [[Cell(tmp_path / "a.png")] * 8] * 5).width > 8 * 192
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_plots(tmp_path):
    plot_curves({"embedding": {"loss": [(0, 1.0), (1, 0.5)]}, "tuning": {"loss": [(0, 1.0)]}}, tmp_path / "l.png")
    assert Image.open(tmp_path / "l.png").width > 0
    records = [{"settings": {"eta": e}, "metrics": {"psnr_to_input": e}} for e in (0.1, 0.5, 0.5)]
    scores = ("clip_score", "psnr_to_input")
    assert plot_tradeoff(records, "eta", scores, tmp_path / "eta.png") and (tmp_path / "eta.png").exists()
    assert not plot_tradeoff(records[1:], "eta", scores, tmp_path / "none.png")  # one value is no trade-off
    assert not (tmp_path / "none.png").exists()


# One task's report.


def report(model, folder, cache_dir, edits=2):
    task = EditTask(torch.zeros(1, 3, 32, 32), "a red heart", "a heart")
    logger = WandbLogger(mode="disabled")
    reporter = RunReporter(folder, model, task, "imagic", TuningCache(dir=cache_dir), logger)
    with reporter.stage("embedding"):
        for i in reporter.progress(range(3), "embedding", 3):
            reporter.scalar("embedding", i, loss=1.0 / (i + 1))
    state = reporter.cached({"stage": "embedding"}, lambda: STATE)
    made = [Edit(torch.full((3, 32, 32), 0.1 * i), {"eta": 0.5 + 0.1 * i, "by": "a/b c"}) for i in range(edits)]
    return reporter, EditResult(made, torch.zeros(3, 32, 32), {"cosine": 0.5}, state)


def test_report_writes_everything(tmp_path, tiny_model, capsys):
    with WandbLogger(mode="disabled").run(tmp_path, {}):
        reporter, result = report(tiny_model, tmp_path / "out", tmp_path / "cache")
        lines = reporter.finish(result)
    out = tmp_path / "out"
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    edits = {"edits/00_eta-0.5_by-a-b-c.png", "edits/01_eta-0.6_by-a-b-c.png"}
    pictures = {"input.png", "reconstruction.png", "sheet.png", "plots/loss.png", "plots/eta.png"}
    assert names == edits | pictures | {"metrics.json", "timings.json", "tensors.safetensors"}
    numbers = json.loads((out / "metrics.json").read_text())
    assert numbers["prompt"] == "a red heart" and numbers["run"] == {"cosine": 0.5}
    assert numbers["reconstruction"]["psnr"] == 100.0
    assert {"psnr_to_input", "clip_score", "clip_similarity_to_input"} <= numbers["edits"][1]["metrics"].keys()
    # a grey level off by 0.1 in a range of 2
    assert numbers["edits"][1]["metrics"]["psnr_to_input"] == pytest.approx(26.02, abs=0.01)
    timings = json.loads((out / "timings.json").read_text())
    assert timings["seconds"]["embedding"] >= 0 and timings["peak_memory_bytes"]["embedding"] > 1e7
    assert lines[-1].endswith("sheet.png") and len(lines) <= 5
    assert "loss=" in capsys.readouterr().err  # the bar shows it

    again, _ = report(tiny_model, tmp_path / "again", tmp_path / "cache")
    assert again.reused == ["embedding"]


def test_an_edit_costs_its_tuning_wherever_done_but_no_keeping_nor_reconstruction(tmp_path, tiny_model, monkeypatch):
    def evaluate(seconds=0.1):
        time.sleep(seconds)
        tiny_model.predict_noise(torch.zeros(1, 4, 8, 8), 0, tiny_model.encode_text([""]))

    def tune():
        evaluate()
        return STATE

    def slow(tensors):
        time.sleep(0.7)
        return ""

    monkeypatch.setattr("reporting.cache._checksum", slow)  # which a miss and a hit ask for once each

    def cost():
        logger = WandbLogger("disabled")
        task = EditTask(torch.zeros(1, 3, 32, 32), "a")
        reporter = RunReporter(tmp_path / "run", tiny_model, task, "m", TuningCache(dir=tmp_path / "cache"), logger)
        assert same(reporter.cached({"stage": "tuning"}, tune), STATE)
        evaluate()
        with reporter.stage("reconstruction"):
            evaluate(0.7)
        reporter.finish(EditResult([Edit(torch.zeros(3, 32, 32))], torch.zeros(3, 32, 32)))
        return reporter.reused, json.loads((tmp_path / "run" / "timings.json").read_text())["cost"]

    (tuned, first), (reused, again) = cost(), cost()
    assert (tuned, reused) == ([], ["tuning"])
    assert first["evaluations"] == again["evaluations"] == 2
    assert 0.2 <= first["seconds"] < 0.7 and 0.2 <= again["seconds"] < 0.7


def test_peak_memory_is_not_that_of_the_process_that_started_this_one():
    child = "import torch; from reporting.reporter import _peak_memory; print(_peak_memory(torch.device('cpu')))"
    parent = f"""
import subprocess, sys
held = bytearray(b"x") * 1_500_000_000
print(subprocess.run([sys.executable, "-c", {child!r}], capture_output=True, text=True, check=True).stdout)
"""
    root = os.path.dirname(os.path.dirname(__file__))
    done = subprocess.run([sys.executable, "-c", parent], cwd=root, capture_output=True, text=True, check=True)
    assert 5e7 < int(done.stdout) < 1.4e9


def test_a_full_disk_leaves_earlier_outputs(tmp_path, tiny_model, monkeypatch):
    reporter, result = report(tiny_model, tmp_path / "out", tmp_path / "cache")
    reporter.finish(result)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("reporting.reporter.save_file", full)
    result.edits[0].image += 0.5
    with pytest.raises(OSError) as error:
        reporter.finish(result)
    assert "the disk is full" in explain(error.value)
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before


def test_cached_tuning_depends_on_model_image_and_key(tmp_path, tiny_model):
    def tuned(image, key, dtype="torch.float32", kernels=("auto", True)):
        task = EditTask(image, "a")
        cache = TuningCache(dir=tmp_path)
        reporter = RunReporter(tmp_path, tiny_model, task, "m", cache, WandbLogger("disabled"), kernels)
        reporter.identity["dtype"] = dtype
        reporter.cached(key, lambda: STATE)
        return bool(reporter.reused)

    black, white = -torch.ones(1, 3, 32, 32), torch.ones(1, 3, 32, 32)
    assert [tuned(black, {"seed": 0}), tuned(black, {"seed": 0})] == [False, True]
    assert not tuned(white, {"seed": 0})
    assert not tuned(black, {"seed": 1})
    assert not tuned(black, {"seed": 0}, "torch.bfloat16")
    assert not tuned(black, {"seed": 0}, kernels=("reference", True))


def test_disabled_logger_never_imports_wandb():
    code = (
        "import sys, pathlib; from reporting.logger import WandbLogger; log = WandbLogger('disabled')\n"
        "with log.run(pathlib.Path('.'), {}): log.scalars('s', 0, {'loss': 1.0}); log.summary({})\n"
        "assert 'wandb' not in sys.modules"
    )
    root = os.path.dirname(os.path.dirname(__file__))
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
    with pytest.raises(InputError, match="is unknown: choose from"):
        WandbLogger("on")


# Sweeps.


def write_job(folder, number, overrides, edits=None, error=None):
    job = folder / str(number)
    (job / ".hydra").mkdir(parents=True)
    (job / ".hydra" / "overrides.yaml").write_text("".join(f"- {o}\n" for o in overrides))
    if error:
        (job / "error.txt").write_text(error)
    if edits is not None:
        (job / "edits").mkdir()
        records = []
        for i, (edit_settings, color) in enumerate(edits):
            Image.new("RGB", (64, 64), color).save(job / "edits" / f"{i}.png")
            metrics = {"psnr_to_input": 20.0 + i}
            records.append({"file": f"edits/{i}.png", "settings": edit_settings, "metrics": metrics})
        Image.new("RGB", (64, 64), "white").save(job / "input.png")
        numbers = {"prompt": "a cat", "reconstruction": {"psnr": 30.0}, "edits": records}
        (job / "metrics.json").write_text(json.dumps(numbers))


def test_a_sweep_of_two_settings_is_a_table_and_a_grid(tmp_path):
    colors = {}
    for n, (eta, seed) in enumerate([(e, s) for e in ("0.4", "0.6", "0.8") for s in ("0", "1")]):
        colors[eta, seed] = (50 * n, 0, 255)
        overrides = ["method=imagic", f"method.eta={eta}", f"seed={seed}"]
        if n == 3:
            write_job(tmp_path, n, overrides, error="the loss became NaN\n")
        else:
            write_job(tmp_path, n, overrides, [({"eta": float(eta), "sample": 0}, colors[eta, seed])])
    rows = read_jobs(tmp_path)
    assert swept(rows) == ["method.eta", "seed"]
    write_summary(tmp_path, rows)
    with open(tmp_path / "summary.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 6 and table[3]["error"] == "the loss became NaN" and table[3]["file"] == ""
    assert [row["method.eta"] for row in table] == ["0.4", "0.4", "0.6", "0.6", "0.8", "0.8"]
    assert table[5]["psnr_to_input"] == "20.0" and (tmp_path / table[5]["file"]).exists()

    picture = np.array(Image.open(tmp_path / "summary.png").convert("RGB"))
    at = {}
    for eta, seed in colors:
        if (eta, seed) != ("0.6", "1"):
            rows_of, columns_of = np.nonzero((picture == colors[eta, seed]).all(-1))
            at[eta, seed] = (columns_of.min(), rows_of.min())
    assert len({at[e, s][0] for e, s in at if e == "0.8"}) == 1  # one column for each eta: it has more values
    assert at["0.4", "0"][0] < at["0.6", "0"][0] < at["0.8", "0"][0]
    assert at["0.4", "0"][1] < at["0.4", "1"][1]


def test_sweep_axes_include_what_differs_inside_a_job():
    def row(job, typed, **made):
        return Row(job, typed, made)

    one = {"prompt": "a"}
    assert swept([row("0", one, eta=0.4, sample=0), row("0", one, eta=0.6, sample=0)]) == ["edit.eta"]
    # an override that names the setting already needs no second axis
    single = [row("0", {"method.eta": "0.4"}, eta=0.4), row("1", {"method.eta": "0.6"}, eta=0.6)]
    assert swept(single) == ["method.eta"]
    assert swept([row("0", one, eta=0.4)]) == []


def test_any_sweep_can_be_laid_out(tmp_path):
    """Three settings, a list inside a job, a job that failed before saying which edits it would make, one that was
    killed, one row only."""
    write_job(tmp_path, 0, ["a=1", "b=x", "c=u"], [({"eta": 0.1}, "red"), ({"eta": 0.2}, "blue")])
    write_job(tmp_path, 1, ["a=1", "b=y", "c=v"], [({"eta": 0.1}, "red")])
    write_job(tmp_path, 2, ["a=2", "b=x", "c=u"], error="no")
    write_job(tmp_path, 10, ["a=2", "b=y", "c='p,q=r'"])
    rows = read_jobs(tmp_path)
    assert [row.job for row in rows] == ["0", "0", "1", "2", "10"]
    assert rows[-1].error == "the job did not finish" and rows[-1].overrides["c"] == "'p,q=r'"
    assert lay_out(rows, swept(rows)).width > 0
    assert lay_out(rows[:1], []).width > 0
    assert lay_out(rows[:3], swept(rows[:3])).width > 0


def test_summary_ends_with_1_if_a_job_failed_and_skips_older_jobs(tmp_path, capsys):
    from omegaconf import OmegaConf

    write_job(tmp_path, 9, ["seed=9"], [({}, "red")])  # of an earlier sweep in the same folder
    os.utime(tmp_path / "9" / ".hydra" / "overrides.yaml", (1, 1))
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    summary = Summary()
    summary.on_multirun_start(config)
    write_job(tmp_path, 0, ["seed=0"], [({}, "red")])
    summary.on_multirun_end(config)
    assert "1 jobs, 0 failed" in capsys.readouterr().out
    write_job(tmp_path, 1, ["seed=1"], error="no")
    with pytest.raises(SystemExit) as end:
        summary.on_multirun_end(config)
    assert end.value.code == 1 and "2 jobs, 1 failed" in capsys.readouterr().out


# Free text on the command line.

TEXT = st.text(st.one_of(st.sampled_from("a ,'\"[](){}\\=:$%#"), st.characters(codec="utf-8")), min_size=1, max_size=12)


@given(TEXT)
@settings(max_examples=60, deadline=None)
def test_a_prompt_is_taken_as_it_is(text):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    argument = literal(f"prompt={text}")
    if argument == f"prompt={text}":  # left alone: null, or a string in quotes
        assert text == "null" or (text.strip()[0] in "'\"" and text.strip()[-1] == text.strip()[0])
        return
    override = OverridesParser.create().parse_override(argument)
    assert not override.is_sweep_override() and override.value() == text
    assert unquoted(argument) == f"prompt={text}"


def test_a_sweep_over_prompts_is_written_in_quotes():
    for argument in ("prompt='a, b','c'", 'prompt="a, b"', "prompt=", "source_prompt=null", "seed=0,1"):
        assert literal(argument) == argument
    assert literal("method.inversion_prompt=a, b") == "method.inversion_prompt='a, b'"
    assert literal("model.weights=v1-5 (1).safetensors") == "model.weights='v1-5 (1).safetensors'"
    assert literal("model.weights=a.ckpt,b.ckpt") == "model.weights=a.ckpt,b.ckpt"  # a sweep over two
    assert literal("image=my [old], photo's.png") == r"image='my [old], photo\'s.png'"


# Errors in one line.


def test_explain_tells_mistakes_from_defects():
    from hydra.errors import InstantiationException

    wrapped = InstantiationException("Error in call to target 'x':\nInputError('...')")
    wrapped.__cause__ = InputError("eta=2 is out of range")
    assert explain(wrapped) == "eta=2 is out of range"
    assert explain(ValueError("a bug")) is None
    assert "disk is full" in explain(OSError(errno.ENOSPC, "No space left on device", "x.png"))
    assert explain(OSError(errno.EIO, "I/O error")) is None
