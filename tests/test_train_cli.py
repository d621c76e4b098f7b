"""`train.py` as a user runs it: a folder of pictures with captions becomes a model that `models.load` reads."""

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

import models
import train
from errors import InputError
from files import CLONE
from samplers import FlowSchedule
from tests.conftest import compose

PARTS = ("autoencoder", "clip", "unet")


def state(out, part="autoencoder"):
    return torch.load(out / "training" / f"{part}.pt", weights_only=True)


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    """Settings of all tests, with a folder of pictures."""
    folder = tmp_path_factory.mktemp("photos")
    for i, colour in enumerate(["red", "green", "blue", "white", "black", "yellow"] * 2):
        Image.new("RGB", (40, 36 + i), colour).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {colour} square")
    data = ["data=folder", f"data.path={folder}", "data.held_out=0.25"]
    return [*data, "arch=tiny", "logger.mode=disabled", "device=cpu", "dtype=float32"]


@pytest.fixture(scope="module")
def run(common):
    """Do in this process as `train.py` does with some settings."""
    precision = torch.get_float32_matmul_precision()
    yield lambda *settings: train.run(compose("train", *common, *settings))
    torch.set_float32_matmul_precision(precision)


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """The whole recipe for one GPU, on a CPU and in a blink: its folder, and its last print."""
    out = tmp_path_factory.mktemp("out")
    small = [f"part.{p}.training.{s}" for p in PARTS for s in ("minutes=0.004", "batch_size=4", "workers=1")]
    small += [f"part.{p}.objective.probes=16" for p in PARTS] + ["part.unet.training.compile=false"]
    small += ["part.evaluation.pictures=16", "part.evaluation.samples=8", "part.evaluation.steps=2"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert run("+experiment=openmoji64_gpu", f"out={out}", *small)
    return out, printed.getvalue()


def test_the_recipe_makes_a_model_and_judges_it(trained):
    out, printed = trained
    model = models.load(out)
    assert model.autoencoder.scale_factor != 1.0  # measured
    assert all(state(out, part)["seconds"] >= 0.24 for part in PARTS)
    for name in ("samples", "reconstructions"):
        assert len(list((out / "training").glob(f"{name}_*.png"))) == 1
    numbers = json.loads((out / "evaluation.json").read_text())["results"]
    shares = ("clip_top1_of_100", "samples_top1_of_100", "samples_pixels_top1_of_100")
    assert {f"{share}_{data}" for share in shares for data in ("trained", "heldout")} < numbers.keys()
    assert all(f'"{name}": {value}' in printed for name, value in numbers.items())
    assert Image.open(out / "samples_trained.png").size == (256, 32)
    made = json.loads((out / "training" / "run.json").read_text())
    assert made["settings"]["seed"] == 0 and made["versions"]["torch"] and made["command"]


def steps(out, count, *settings):
    small = ("part.training.batch_size=4", "part.objective.probes=16")
    return ["part=autoencoder", f"out={out}", f"part.training.steps={count}", *small, *settings]


@pytest.mark.slow
def test_torchrun_trains_the_same_weights_and_sigterm_costs_nothing(run, common, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    settings = [*common, *steps(two, 20, "part.training.save_every=2")]
    with subprocess.Popen([*torchrun, *settings], cwd=CLONE, stderr=subprocess.PIPE, text=True) as process:
        while not (two / "training" / "autoencoder.pt").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert "the state is saved" in process.stderr.read()
    assert 2 <= state(two)["step"] < 20
    assert run(*steps(two, 20)) and run(*steps(one, 20))
    a, b = (torch.cat([p.flatten() for p in state(out)["trained"].values()]) for out in (one, two))
    assert (a - b).norm() < 1e-3 * a.norm()


def test_init_takes_the_weights_that_fit(run, trained, tmp_path, capsys):
    run(*steps(tmp_path, 1, f"init={trained[0]}", "part.training.lr=1e-12", "part.training.weight_decay=0"))
    before, after = (models.checkpoints.read_part(out, "autoencoder") for out in (trained[0], tmp_path))
    torch.testing.assert_close(after, before, atol=1e-6, rtol=1e-3)
    assert "random" not in capsys.readouterr().out
    module, weight = torch.nn.Linear(2, 3), torch.ones(3, 2)
    train.start_from(module, {"weight": weight, "bias": torch.ones(9)}, "init=other")
    assert torch.equal(module.weight, weight) and "1 of 2 weights start at random" in capsys.readouterr().out
    with pytest.raises(InputError, match="init=stranger"):
        train.start_from(module, {"weight": torch.zeros(9, 9)}, "init=stranger")


def test_a_flow_unet_is_trained_beside_the_same_parts(run, trained, tmp_path):
    for name in ("autoencoder.safetensors", "clip.safetensors", "config.json"):
        shutil.copy(trained[0] / name, tmp_path)
    flow = ["arch.prediction=flow", "arch.schedule.kind=flow", "+arch.schedule.shift=1.0"]
    small = ["part.training.steps=2", "part.training.batch_size=4", "part.objective.probes=16"]
    assert run("part=unet", f"out={tmp_path}", *flow, *small)
    model = models.load(tmp_path)
    assert model.prediction == "flow" and model.schedule == FlowSchedule(shift=1.0)
    assert len(list((tmp_path / "training").glob("samples_*.png"))) == 1
    with pytest.raises(InputError, match=r"schedule\.kind=flow"):
        run("part=unet", f"out={trained[0]}", "arch.prediction=flow")


def test_a_part_needs_the_others_in_the_same_sizes(run, trained, tmp_path):
    with pytest.raises(InputError, match="autoencoder"):
        run("part=unet", f"out={tmp_path}")
    with pytest.raises(InputError, match=r"arch\.text"):
        run("part=unet", f"out={trained[0]}", "arch.text.width=64")
    for wrong in ("unet.context_dim=64", "text.hidden_layer=penultimate"):
        with pytest.raises(InputError, match=wrong.partition("=")[0]):
            run("part=clip", f"out={tmp_path}", f"++arch.{wrong}")


def test_bad_settings_end_before_the_training(run, trained, tmp_path, monkeypatch):
    for wrong in ("seed=-1", "seed=1.5", "objective.probes=0", "objective.kl_weight=nan", "training.lr=inf"):
        setting = wrong if "seed" in wrong else f"part.{wrong}"
        with pytest.raises(InputError, match=wrong.partition("=")[0].rpartition(".")[2]):
            run("part=autoencoder", f"out={tmp_path}", setting)
    for wrong in ("objective.prompts=5", "objective.prompts=cat", "objective.foo=1", "training.foo=1", "name=5"):
        with pytest.raises(InputError, match=wrong.partition("=")[0].rpartition(".")[2]):
            run("part=unet", f"out={trained[0]}", f"++part.{wrong}")
    for rank, world in (("x", "1"), ("0", "abc"), ("0", "2"), ("1", "1")):  # without torchrun
        monkeypatch.setenv("RANK", rank), monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(InputError, match="WORLD_SIZE"):
            run("part=unet", f"out={trained[0]}")
