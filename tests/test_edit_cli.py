"""`edit.py` as a user runs it: each method, a sweep, and what is said when something is wrong."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import models
from errors import InputError
from models import attention
from reporting.outcome import explain, literal

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
    alone = {"WORLD_SIZE": "1"}  # as clusters have it for a single process
    return alone | clean | {"PALIMPSEST_CACHE": str(user / "cache"), "OMP_NUM_THREADS": "1"}


def edit(user, *settings):
    """Run the command; (exit code, stdout, stderr without progress bars)."""
    command = [sys.executable, str(EDIT), "model.weights=tiny", *settings]
    done = subprocess.run(command, cwd=user, env=environment(user), capture_output=True, text=True)
    told = [line.split("\r")[-1] for line in done.stderr.splitlines()]
    return done.returncode, done.stdout, [line for line in told if line.strip() and "it/s" not in line]


PHOTO = ["image=photo.jpg", "prompt=a red heart"]


def run_here(user, folder, *settings):
    """The same in this process, which spares loading everything; what the run comes to, and errors are raised."""
    import hydra

    import edit as command

    before, threads = Path.cwd(), torch.get_num_threads()
    os.chdir(user)
    torch.set_num_threads(1)  # as in `environment`: sums in another order end in other bits
    try:
        with hydra.initialize_config_dir(str(EDIT.parent / "conf"), version_base="1.3"):
            cfg = hydra.compose("edit", ["model.weights=tiny", f"cache.dir={user / 'cache/tuning'}", *settings])
            return command.edit(cfg, folder, "imagic")[0]
    finally:
        os.chdir(before)
        torch.set_num_threads(threads)


def files_of(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "wandb" not in p.parts}


REPORT = {"input.png", "reconstruction.png", "sheet.png", "metrics.json", "timings.json", "tensors.safetensors"}


def test_imagic_for_a_list_of_eta_then_a_sweep(user, capsys):
    """The sweep's first job has the settings of the single run, and so, from another process, its bytes; it reuses
    the tuning of that run, and survives jobs that fail."""
    prompt = "a dog's hat, [red]"  # which Hydra alone would refuse, or take for two
    imagic = ["image=photo.jpg", *SHORT, "fit=pad", "logger.mode=disabled"]
    one, many = user / "one", user / "many"
    run_here(user, one, *imagic, literal(f"prompt={prompt}"), "method.eta=[0.4,0.8]")
    edits = {"edits/00_eta-0.4_sample-0.png", "edits/01_eta-0.8_sample-0.png"}
    assert files_of(one) == REPORT | edits | {"plots/loss.png", "plots/eta.png"}
    assert all(Image.open(one / name).size == (32, 32) for name in edits | {"input.png", "reconstruction.png"})
    assert Image.open(one / "input.png").getpixel((16, 1)) == (255, 255, 255)  # a bar of fit=pad
    numbers = json.loads((one / "metrics.json").read_text())
    assert [e["settings"]["eta"] for e in numbers["edits"]] == [0.4, 0.8] and numbers["prompt"] == prompt
    assert {"embedding", "tuning", "editing"} <= json.loads((one / "timings.json").read_text())["seconds"].keys()
    assert f"contact sheet: {one / 'sheet.png'}" in capsys.readouterr().out

    settings = ["hydra.sweep.dir=many", "--multirun", "method.eta=[0.4,0.8],1.5", "sampler.eta=0,1"]
    code, out, err = edit(user, *imagic, f"prompt={prompt}", *settings)
    assert code == 1 and len(err) == 2, err
    assert all("method.eta is 1.5" in line for line in err)
    assert "4 jobs, 2 failed" in out
    for name in files_of(one) - {"timings.json"}:
        assert (many / "0" / name).read_bytes() == (one / name).read_bytes(), name
    for job in ("0", "1"):
        assert json.loads((many / job / "timings.json").read_text())["reused_tuning"] == ["embedding", "tuning"]
    assert (many / "1" / "sheet.png").read_bytes() != (one / "sheet.png").read_bytes()
    with open(many / "summary.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert {row["prompt"] for row in table} == {prompt}
    assert [row["error"] != "" for row in table] == [False] * 4 + [True] * 2
    assert [row["sampler.eta"] for row in table] == ["0", "0", "1", "1", "0", "1"]
    assert Image.open(many / "summary.png").width > 500


def test_direct_inversion_with_wandb_offline(user):
    run = ["method=direct_inversion", "sampler.steps=3", "method.edit_strength=0", "hydra.run.dir=inversion"]
    code, out, err = edit(user, *PHOTO, *run)
    folder = user / "inversion"
    assert code == 0 and err == [], err
    assert files_of(folder) >= REPORT and f"contact sheet: {folder / 'sheet.png'}" in out
    (file,) = (folder / "edits").iterdir()
    assert file.read_bytes() == (folder / "reconstruction.png").read_bytes()  # strength 0 replays
    assert list(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert not (user / "wandb").exists()  # nothing is left where the user stands


def test_a_run_whose_tasks_failed_says_so(user):
    (user / "edits.csv").write_text("image,prompt\nphoto.jpg,a heart\nmissing.jpg,a heart\n")
    quick = ["method=direct_inversion", "sampler.steps=2", "logger.mode=disabled", "hydra.run.dir=list"]
    code, out, err = edit(user, "task=folder", "task.path=edits.csv", *quick)
    assert code == 1 and "1 of 2 tasks done, 1 failed" in out
    assert err[-1] == "error: 1 tasks failed: results.csv and their error.txt say why"


WRONG = {
    "method=imagick": "choose from ddim_inversion",
    "method.etta=0.5": "there is no setting method.etta",
    "image=missing.png": "missing.png",
}


@pytest.mark.parametrize("setting", WRONG)
def test_a_mistake_is_one_line(user, setting):
    code, out, err = edit(user, *PHOTO, setting, "hydra.run.dir=wrong")
    assert (code, out, len(err)) == (1, "", 1), err
    assert WRONG[setting] in err[0] and err[0].startswith("error: ")


def test_more_mistakes_in_one_line(user, tmp_path):
    """The same in one process, for speed: what `edit` raises is explained by the line."""
    (user / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    (user / "half").mkdir(exist_ok=True)
    (user / "half" / "config.json").write_text((user / "tiny" / "config.json").read_text())
    wrong = {
        "prompt=": "prompt is empty",
        "task=openmoji_edits": "image= is for one picture",
        "image=broken.png": "broken.png",
        "method.eta=1.5": "from 0 to 1",
        "method.tuning_lr=abc": "method.tuning_lr is abc",
        "sampler.steps=0": "sampler.steps",
        "fit=squash": "crop, pad, stretch, keep",
        "size=31": "size=31",
        "size=abc": "size=abc",
        "attention=fast": "auto, fused, sdpa, reference",
        "seed=-1": "seed=-1",
        "dtype=int8": "float32, bfloat16 or float16",
        "channels_last=maybe": "auto, true or false",
        "compile=fast": "true or false",
        "device=tpu0": "device=tpu0",
        "device=mps": "auto, cpu, cuda or cuda:N",
        "device=cuda:256": "CUDA devices",  # torch would read cuda:0
        "device=cuda:99": "CUDA devices",
        "logger.mode=loud": "online, offline, disabled",
        "cache.max_gb=0": "cache.max_gb=0",
        "cache.max_gb=abc": "cache.max_gb=abc",
        "model.weights=nowhere": "nowhere",
        "model.weights=half": "half",
        "model.ema=abc": "model.ema is abc",
        "method.embedding_lr=1e30": "stage 'embedding' at step",
        "+method.colour=blue": "unexpected keyword argument 'colour'",
    }
    quiet = ["logger.mode=disabled", "cache.enabled=false", *SHORT, *PHOTO]
    for setting, part in wrong.items():
        with pytest.raises(Exception) as error:
            run_here(user, tmp_path, *quiet, setting)
        line = explain(error.value)
        assert line and part in line and "\n" not in line, (setting, line)
    assert not list(tmp_path.iterdir())  # nothing was written


def test_processes_that_share_a_run_sweep_nothing(user, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, err = edit(user, *PHOTO, "--multirun", "seed=0,1", "hydra.sweep.dir=shared")
    assert code == 1 and len(err) == 1 and "--multirun" in err[0] and "contact sheet" not in out


def test_the_published_preset_obeys_the_sampler():
    import hydra

    asked = {(): (100, 0), ("sampler.steps=20", "sampler.eta=1"): (20, 1), ("sampler=ddim",): (50, 0)}
    with hydra.initialize_config_dir(str(EDIT.parent / "conf"), version_base="1.3"):
        for settings, expected in asked.items():
            sampler = hydra.compose("edit", ["method=direct_inversion_paper", *settings]).method.sampler
            assert (sampler.steps, sampler.eta) == expected
        assert hydra.compose("edit", ["method=direct_inversion"]).method.sampler.steps == 50


def test_the_attention_backend_is_the_one_asked_for(user, tmp_path, monkeypatch):
    asked, plain = set(), attention.attention
    monkeypatch.setattr(attention, "attention", lambda q, k, v, backend: asked.add(backend) or plain(q, k, v, backend))
    run_here(user, tmp_path, *PHOTO, *SHORT, "logger.mode=disabled", "attention=reference")
    assert asked == {"reference"}


def test_fused_attention_is_refused_before_a_model_is_loaded(user, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    attention.why_not_fused.cache_clear()
    with pytest.raises(InputError, match=r"needs a CUDA device, not cpu|needs Triton"):
        run_here(user, tmp_path, *PHOTO, "attention=fused", "device=cpu", "model.weights=nowhere")


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
    for word in ("prompt=", "--multirun", "method: ddim_inversion", "imagic", "seed=0"):
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
