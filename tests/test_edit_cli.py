"""`edit.py` as a user runs it: each method, a sweep, and what is said when something is wrong."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import models

EDIT = Path(__file__).resolve().parent.parent / "edit.py"
SHORT = ["sampler.steps=3", "method.embedding_steps=3", "method.tuning_steps=2"]


@pytest.fixture(scope="module")
def user(tmp_path_factory, tiny_model):
    """A folder of a user's with a tiny checkpoint and a photo, away from the clone."""
    folder = tmp_path_factory.mktemp("user")
    models.save(tiny_model, folder / "tiny")
    Image.effect_noise((90, 60), 60).convert("RGB").save(folder / "photo.jpg")
    return folder


def environment(user):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "HYDRA", "PALIMPSEST"))}
    return clean | {"PALIMPSEST_CACHE": str(user / "cache"), "OMP_NUM_THREADS": "1"}


def edit(user, *settings):
    """Run the command; (exit code, stdout, stderr without progress bars)."""
    command = [sys.executable, str(EDIT), "model.weights=tiny", *settings]
    done = subprocess.run(command, cwd=user, env=environment(user), capture_output=True, text=True)
    told = [line.split("\r")[-1] for line in done.stderr.splitlines()]
    return done.returncode, done.stdout, [line for line in told if line.strip() and "it/s]" not in line]


PHOTO = ["image=photo.jpg", "prompt=a red heart"]


@pytest.fixture(scope="module")
def imagic(user):
    """One run of Imagic for a list of eta, with W&B offline."""
    return edit(user, *PHOTO, *SHORT, "method=imagic", "method.eta=[0.4,0.8]", "fit=pad", "hydra.run.dir=one")


def test_imagic_writes_its_folder(user, imagic):
    code, out, err = imagic
    assert code == 0 and err == [], err
    one = user / "one"
    files = {str(p.relative_to(one)) for p in one.rglob("*") if p.is_file() and "wandb" not in p.parts}
    edits = {"edits/00_eta-0.4_sample-0.png", "edits/01_eta-0.8_sample-0.png"}
    pictures = {"input.png", "reconstruction.png", "sheet.png", "plots/loss.png", "plots/eta.png"}
    assert edits | pictures | {"metrics.json", "timings.json", "tensors.safetensors"} <= files
    assert all(Image.open(one / name).size == (32, 32) for name in edits | {"input.png", "reconstruction.png"})
    assert Image.open(one / "input.png").getpixel((16, 1)) == (255, 255, 255)  # a bar of fit=pad
    assert list(one.glob("wandb/offline-run-*/run-*.wandb"))
    numbers = json.loads((one / "metrics.json").read_text())
    assert [e["settings"]["eta"] for e in numbers["edits"]] == [0.4, 0.8]
    assert {"embedding", "tuning", "editing"} <= json.loads((one / "timings.json").read_text())["seconds"].keys()
    assert f"contact sheet: {one / 'sheet.png'}" in out
    assert not (user / "wandb").exists()  # nothing is left where the user stands


def test_a_sweep_reuses_the_tuning_and_survives_a_failing_job(user, imagic):
    """The first job has the settings of the single run, and so, from another process and without W&B, its bytes."""
    code, out, err = edit(
        user, *PHOTO, *SHORT, "fit=pad", "logger.mode=disabled", "hydra.sweep.dir=many",
        "--multirun", "method.eta=[0.4,0.8],1.5", "sampler.eta=0,1",
    )  # fmt: skip
    many = user / "many"
    assert code == 1 and len(err) == 2, err
    assert all("method.eta is 1.5" in line for line in err)
    assert "4 jobs, 2 failed" in out
    one = user / "one"
    for name in ("sheet.png", "edits/00_eta-0.4_sample-0.png", "tensors.safetensors", "metrics.json"):
        assert (many / "0" / name).read_bytes() == (one / name).read_bytes(), name
    for job in ("0", "1"):
        reused = json.loads((many / job / "timings.json").read_text())["reused_tuning"]
        assert reused == ["embedding", "tuning"]
    assert (many / "1" / "sheet.png").read_bytes() != (one / "sheet.png").read_bytes()
    with open(many / "summary.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["error"] != "" for row in table] == [False] * 4 + [True] * 2
    assert [row["sampler.eta"] for row in table] == ["0", "0", "1", "1", "0", "1"]
    assert Image.open(many / "summary.png").width > 500


def test_direct_inversion(user):
    run = ["method=direct_inversion", "sampler.steps=3", "method.edit_strength=0", "logger.mode=disabled"]
    code, _, err = edit(user, *PHOTO, *run, "hydra.run.dir=inversion")
    assert code == 0 and err == [], err
    (file,) = (user / "inversion" / "edits").iterdir()
    assert file.read_bytes() == (user / "inversion" / "reconstruction.png").read_bytes()  # strength 0 replays
    assert not (user / "inversion" / "wandb").exists()


WRONG = {
    "method=imagick": "choose from direct_inversion",
    "method.etta=0.5": "there is no setting method.etta",
    "image=missing.png": "missing.png",
}


@pytest.mark.parametrize("setting", WRONG)
def test_a_mistake_is_one_line(user, setting):
    code, out, err = edit(user, *PHOTO, setting, "hydra.run.dir=wrong")
    assert (code, out, len(err)) == (1, "", 1), err
    assert WRONG[setting] in err[0] and err[0].startswith("error: ")


def test_more_mistakes_in_one_line(user, monkeypatch, tmp_path):
    """The same in one process, for speed: what `edit` raises is explained by the line."""
    import hydra

    import edit as command
    from reporting.outcome import explain

    monkeypatch.chdir(user)
    (user / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    (user / "half").mkdir(exist_ok=True)
    (user / "half" / "config.json").write_text((user / "tiny" / "config.json").read_text())
    wrong = {
        "prompt=": "prompt is empty",
        "image=broken.png": "broken.png",
        "method.eta=1.5": "from 0 to 1",
        "method.tuning_lr=abc": "method.tuning_lr is abc",
        "sampler.steps=0": "sampler.steps",
        "fit=squash": "crop, pad, stretch",
        "seed=-1": "seed=-1",
        "dtype=int8": "float32, bfloat16 or float16",
        "device=tpu0": "device=tpu0",
        "device=cuda:99": "CUDA devices",
        "logger.mode=loud": "online, offline, disabled",
        "cache.max_gb=0": "cache.max_gb=0",
        "model.weights=nowhere": "nowhere",
        "model.weights=half": "half",
        "method.embedding_lr=1e30": "stage 'embedding' at step",
        "+method.colour=blue": "unexpected keyword argument 'colour'",
    }
    with hydra.initialize_config_dir(str(EDIT.parent / "conf"), version_base="1.3"):
        for setting, part in wrong.items():
            quiet = ["model.weights=tiny", "logger.mode=disabled", "cache.enabled=false", *SHORT, *PHOTO]
            cfg = hydra.compose("edit", [*quiet, setting])
            with pytest.raises(Exception) as error:
                command.edit(cfg, tmp_path, "imagic")
            line = explain(error.value)
            assert line and part in line and "\n" not in line, (setting, line)
    assert not list(tmp_path.iterdir())  # nothing was written


def test_help_is_quick_and_imports_nothing_heavy(user):
    code = (
        "import runpy, sys; sys.argv = ['edit.py', '--help']\n"
        f"try: runpy.run_path({str(EDIT)!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'wandb', 'open_clip', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=EDIT.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("prompt=", "--multirun", "method: direct_inversion", "imagic", "seed=0"):
        assert word in done.stdout


def test_ctrl_c_is_one_line_and_130(user):
    command = [sys.executable, str(EDIT), "model.weights=tiny", *PHOTO, "method.embedding_steps=1000000"]
    process = subprocess.Popen(
        [*command, "logger.mode=disabled", "hydra.run.dir=stopped"], cwd=user, env=environment(user),
        stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    told = b""
    while b"embedding" not in told:  # the first bar: the work has begun
        told += process.stderr.read1(4096)
    process.send_signal(signal.SIGINT)
    told += process.communicate(timeout=60)[1]
    assert process.returncode == 130 and told.endswith(b"interrupted\n") and b"Traceback" not in told
    assert {p.name for p in (user / "stopped").iterdir()} <= {".hydra", "edit.log"}
