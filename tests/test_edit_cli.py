"""`edit.py` as a user runs it: one picture, a list by two processes, and the line that each mistake gives."""

import csv
import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

import edit as command
import models
from errors import InputError
from evaluation import config
from evaluation.cli import explain, quoted
from evaluation.runner import task_seed
from tests.conftest import compose

EDIT = Path(command.__file__).resolve()
SHORT = ["sampler.steps=3", "method.embedding_steps=3", "method.tuning_steps=2"]
PHOTO = ["image=photo.jpg", "prompt=a red heart"]


@pytest.fixture(scope="module")
def user(tmp_path_factory, tiny_model):
    """A user's folder, away from the clone: a tiny checkpoint, a photo, and a list of edits, of which one fails."""
    folder = tmp_path_factory.mktemp("user")
    models.save(tiny_model, folder / "tiny")
    generator = np.random.default_rng(0)
    for name in ("photo.jpg", "dog.png", "truth.png"):
        Image.fromarray(generator.integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(folder / name)
    (folder / "broken.png").write_bytes((folder / "dog.png").read_bytes()[:1000])
    lines = [
        {"image": "broken.png", "prompt": "a cat", "name": "broken"},
        {"image": "dog.png", "prompt": "a red heart", "source_prompt": "a heart", "truth": "truth.png", "name": "dog"},
        {"image": "photo.jpg", "prompt": "a red cat", "category": "colour", "name": "cat"},
    ]
    (folder / "edits.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def environment(user):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "HYDRA", "PALIMPSEST"))}
    return clean | {"PALIMPSEST_CACHE": str(user / "cache"), "OMP_NUM_THREADS": "1"}


def edit(user, *arguments):
    """Run the command; (exit code, stdout, lines of stderr without progress bars)."""
    command = [sys.executable, str(EDIT), "model.weights=tiny", *arguments]
    done = subprocess.run(command, cwd=user, env=environment(user), capture_output=True, text=True)
    lines = [line.split("\r")[-1] for line in done.stderr.splitlines()]
    return done.returncode, done.stdout, [line for line in lines if line.strip() and not re.search(r"\d/\d+ \[", line)]


def run_here(user, folder, *arguments):
    """The same in this process, which is faster; errors are raised."""
    before = Path.cwd()
    os.chdir(user)
    try:
        given = ["model.weights=tiny", f"cache.dir={user / 'cache/tuning'}", "logger.mode=disabled", *arguments]
        choices = OmegaConf.create({"method": "imagic", "family": None})
        return command.edit(compose("edit", *given), folder, choices)
    finally:
        os.chdir(before)


def rows_of(folder):
    return [json.loads(line) for file in sorted(folder.glob("rows*.jsonl")) for line in file.read_text().splitlines()]


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_one_picture(user):
    prompt = "a dog's hat, [red]"  # which Hydra's grammar refuses
    arguments = ["image=photo.jpg", f"prompt={prompt}", *SHORT, "fit=pad", "method.eta=[0.4,0.8]", "hydra.run.dir=one"]
    code, out, err = edit(user, *arguments)
    assert (code, err) == (0, []), err
    folder = user / "one"
    edits = {"edits/00_eta-0.4_sample-0.png", "edits/01_eta-0.8_sample-0.png"}
    files = {"input.png", "reconstruction.png", "tensors.safetensors", "rows.jsonl", "results.csv", "sheet.png"}
    assert files_of(folder) >= files | edits | {"plots/loss.png"}
    assert Image.open(folder / "input.png").getpixel((16, 1)) == (255, 255, 255)  # a bar of fit=pad
    rows = rows_of(folder)
    assert [(row["edit.eta"], row["file"]) for row in rows] == [(0.4, min(edits)), (0.8, max(edits))]
    assert rows[0].items() >= {"prompt": prompt, "sampler.steps": "3", "method": "imagic", "fit": "pad"}.items()
    assert str(folder / "sheet.png") in out
    assert list(folder.glob("wandb/offline-run-*/run-*.wandb")) and not (user / "wandb").exists()

    # From the cache, at the same cost; rows and pictures of an earlier run in the folder are gone.
    cached = len(list((user / "cache/tuning").glob("*.safetensors")))
    run_here(user, folder, "image=photo.jpg", quoted(f"prompt={prompt}"), "fit=pad", "method.eta=0.8", *SHORT)
    assert len(list((user / "cache/tuning").glob("*.safetensors"))) == cached
    (row,) = rows_of(folder)
    assert row["evaluations"] == rows[1]["evaluations"] - 6  # its way down alone: 3 steps, guided
    assert len(list((folder / "edits").iterdir())) == 1
    assert row["psnr_to_input"] == pytest.approx(rows[1]["psnr_to_input"], abs=0.05)  # sums in another order


def test_two_processes_share_a_list(user, capsys):
    """A broken picture is a row, the rest is edited as its pictures are one by one, and any process reports on all."""
    quick, folder = ["method=sdedit", "sampler.steps=2"], user / "list"
    shared = ["task=folder", "task.path=edits.jsonl", *quick]
    assert [run_here(user, folder, *shared, f"task.shard={i}/2")[1] for i in range(2)] == [1, 1]
    told = capsys.readouterr()
    assert "2 of 3 tasks done, 1 failed" in told.out and re.search("broken failed: .*broken.png", told.err)
    assert files_of(folder) >= {"rows-0.jsonl", "rows-1.jsonl", "results.csv", "index.html", "run.json"}
    with open(folder / "results.csv", encoding="utf-8") as file:
        table = {row["task"]: row for row in csv.DictReader(file)}
    assert {name for name, row in table.items() if row["error"]} == {"broken"} and len(table) == 3
    assert (folder / table["dog"]["truth"]).exists() and table["cat"]["category"] == "colour"

    alone = user / "alone"
    run_here(user, alone, "image=dog.png", "prompt=a red heart", f"seed={task_seed(0, 'dog')}", *quick)
    (row,) = rows_of(alone)
    assert row["clip_score"] == pytest.approx(float(table["dog"]["clip_score"]), abs=1e-3)

    Image.new("RGB", (40, 40), "red").save(user / "broken.png")  # mended, and one process goes on
    run_here(user, folder, *shared)
    assert sorted(row["task"] for row in rows_of(folder) if "error" not in row) == ["broken", "cat", "dog"]
    with pytest.raises(InputError, match="seed was 0, is 1"):
        run_here(user, folder, *shared, "seed=1")


def test_a_mistake_is_one_line(user, tmp_path):
    """In one process, for speed: each is explained by a line that names the setting, before anything is written."""
    wrong = [
        "prompt=", "image=missing.png", "method.eta=1.5", "method.tuning_lr=abc", "sampler.steps=0", "fit=squash",
        "size=31", "seed=-1", "dtype=int8", "channels_last=maybe", "compile=fast", "deterministic=2", "device=tpu0",
        "logger.mode=loud", "model.weights=nowhere", "cache.dir=null", "cache.max_gb=abc", "metrics.fetch=maybe",
        "+method.colour=blue", "method.etta=1", "method.sampler=null", "method.sampler={}", "metrics=null", "~cache",
        "logger.mode=[loud]", "+task.foo=1", "model.weights=null", "+model.vae=7", "+model.text=7", "mask={a:7}",
        "method.tuning_optimizer=[sgd]", "method.tuning_steps=1000000000000", "model.arch=[7]", "~model",
        "deterministic=1",
    ]  # fmt: skip
    for setting in wrong:
        with pytest.raises(Exception) as error:
            run_here(user, tmp_path, "cache.enabled=false", *SHORT, *PHOTO, setting)
        line, (name, _, value) = explain(error.value), setting.partition("=")
        assert line and "\n" not in line, (setting, error.value)
        words = [name.split(".")[-1], value, name.strip("+~").split(".")[0]]
        assert any(word and word in line.lower() for word in words), line
    with pytest.raises(InputError, match=r"^inversion\.fixed_point_steps"):  # as it was typed
        run_here(user, tmp_path, *PHOTO, "method=null_text", "inversion.fixed_point_steps=-1")
    with pytest.raises(InputError, match="one picture"):
        run_here(user, tmp_path, *PHOTO, "task=openmoji_edits")
    assert {path.name for path in tmp_path.iterdir()} <= {"run.json"}


def test_help_is_quick_and_imports_nothing_heavy(user):
    """Half a second of this process's own time: two to spare for a slow machine, since torch alone takes more."""
    code = f"""
import runpy, sys, time
sys.argv = ["edit.py", "--help", "method=sdedit"]
try: runpy.run_path({str(EDIT)!r}, run_name="__main__")
except SystemExit: pass
assert not {{"torch", "wandb", "open_clip", "matplotlib", "pandas"}} & set(sys.modules)
assert time.process_time() < 2
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=EDIT.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("prompt=", "--multirun", "ddim_inversion", "seed=0", "strength=0.8", "[t0]"):
        assert word in done.stdout


# Free text on the command line, and errors.

TEXT = st.text(st.one_of(st.sampled_from("a ,'\"[](){}\\=:$%#"), st.characters(codec="utf-8")), min_size=1, max_size=12)


def value_of(argument):
    """The text that a job gets through `prompt: ${...}` for an argument, or None for another value."""
    override = OverridesParser.create().parse_override(argument)
    if override.is_sweep_override() or not isinstance(override.value(), str):
        return None
    return OmegaConf.create({"text": override.value(), "task": "${text}"}).task


@given(TEXT, st.sampled_from(["prompt", "source_prompt", "negative_prompt"]))
@example("a dog, asleep", "prompt")
@example("a dog's hat ${x} \\${y} ${", "prompt")
@example("true", "prompt")
@settings(max_examples=60, deadline=None)
def test_any_prompt_is_taken_as_it_was_typed(text, name):
    if text[0] not in "'\"" and text != "null":  # the two that Hydra reads itself
        assert value_of(quoted(f"{name}={text}")) == text
    logger = {"_target_": "evaluation.wandb_log.WandbLogger", "mode": "disabled", "project": text}
    assert config.build({"logger": logger}, "logger").about == {"project": text}


@given(TEXT, st.sampled_from(["image", "method.style", "hydra.run.dir"]))
@example("a,b (1).png", "image")
@settings(max_examples=60, deadline=None)
def test_any_text_can_be_given_for_a_setting(text, name):
    """Hydra takes what it is handed. It is the text itself, unless Hydra has another reading of that."""
    argument = quoted(f"{name}={text}")
    if argument != f"{name}={text}" and "${" not in text:
        assert value_of(argument) == text
    override = OverridesParser.create().parse_override(argument)
    assert not (override.is_sweep_override() and (" " in text or name == "image"))
    assert quoted("prompt=a, b", multirun=True) == "prompt=a, b"  # a list only in a sweep


def test_mistakes_are_told_from_defects():
    wrapped = HydraException("Error in call to target 'x'")
    wrapped.__cause__ = InputError("eta=2 is out of range")
    assert explain(wrapped) == "eta=2 is out of range"
    with pytest.raises(ValueError) as error:
        config.build({"bug": {"_target_": "fractions.Fraction", "numerator": "a bug"}}, "bug")
    assert explain(error.value) is None and explain(OSError(errno.EIO, "I/O error")) is None
    for number in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR):
        assert "x.png" in explain(OSError(number, os.strerror(number), "x.png"))
    with pytest.raises(Exception) as error:
        torch.empty(2**60)
    assert "memory" in explain(error.value) and "memory" in explain(MemoryError())
    assert "HOME" in explain(RuntimeError("Could not determine home directory."))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dog.png", "a cat"], ["image=", "prompt="]),
        ([*PHOTO, "method=imagick"], ["error: ", "ddim_inversion"]),
        (["prompt=a\udcff"], ["UTF-8"]),
        ([*PHOTO, "hydra.run.dir=/proc/none"], ["/proc/none"]),
        ([*PHOTO, "cache.dir=photo.jpg/x"], ["photo.jpg"]),
    ],
)
def test_any_error_is_one_line(user, arguments, words):
    code, out, err = edit(user, *arguments, *SHORT, "logger.mode=disabled")
    assert (code, out, len(err)) == (1, "", 1) and all(word in err[0] for word in words), err


def test_a_reader_that_leaves_is_no_error(user):
    command = f"{sys.executable} {EDIT} --help | head -1"
    done = subprocess.run(command, shell=True, cwd=user, env=environment(user), capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.count("\n") == 1


def test_two_runs_in_one_second_have_folders_of_their_own(user):
    command = [sys.executable, str(EDIT), "--cfg", "hydra", "--resolve", "--package", "hydra.run.dir"]
    runs = [subprocess.Popen(command, cwd=user, env=environment(user), stdout=subprocess.PIPE) for _ in range(2)]
    assert len({run.communicate()[0] for run in runs}) == 2


def test_a_run_can_be_repeated_from_what_it_leaves(user):
    """Its folder holds the command, versions and commit, and no edit of another run before."""
    folder = user / "again"
    for stale in ("run.json", "rows.jsonl", "edits/99_old.png", "plots/old.png"):
        (folder / stale).parent.mkdir(parents=True, exist_ok=True)
        (folder / stale).write_text('{"settings": {"se')  # all may be cut short
    run_here(user, folder, *PHOTO, "method=sdedit", "sampler.steps=2", "seed=5")
    run = json.loads((folder / "run.json").read_text())
    assert run["settings"]["seed"] == 5 and run["versions"]["torch"] == torch.__version__.split("+")[0]
    assert run["command"] and re.fullmatch("[0-9a-f]{40}(-dirty)?|", run["commit"])
    assert not {"edits/99_old.png", "plots/old.png"} & files_of(folder)
    with pytest.raises(InputError, match="other settings"):
        run_here(user, folder, "task=openmoji_edits", "method=sdedit")
