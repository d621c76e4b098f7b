"""`train.py` as a user runs it: a folder of pictures with captions becomes a model that `models.load` reads."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import models
from errors import InputError
from training.setup import reconciled

ROOT = Path(__file__).parents[1]


def run(*overrides, processes=0):
    command = [sys.executable, "train.py"]
    if processes:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command.append("train.py")
    overrides = ("arch=tiny", "logger.mode=disabled", "device=cpu", *overrides)
    return subprocess.run([*command, *overrides], cwd=ROOT, capture_output=True, text=True, env=os.environ)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i, colour in enumerate(["red", "green", "blue", "white", "black", "yellow"] * 2):
        Image.new("RGB", (40, 36 + i), colour).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {colour} square")
    return folder


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    for part in ("autoencoder", "clip", "unet"):
        result = run(
            f"part={part}", "data=folder", f"data.path={photos}", "data.held_out=0.25", f"out={out}",
            "part.training.steps=2", "part.training.batch_size=4", "part.objective.probes=16",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-2000:]
    return out


def test_three_parts_make_a_model(trained):
    model = models.load(trained)
    assert model.autoencoder.scale_factor != 1.0  # measured
    z = model.encode_image(torch.rand(4, 3, 32, 32) * 2 - 1)
    assert model.predict_noise(z, 500, model.encode_text(["a red square"])).shape == z.shape
    for part in ("autoencoder", "clip", "unet"):
        lines = [json.loads(line) for line in (trained / "training" / f"{part}.jsonl").read_text().splitlines()]
        assert lines[-1]["step"] == 2 and any("loss" in line for line in lines)
    assert (trained / "training" / "samples_0000002.png").exists()
    assert (trained / "training" / "reconstructions_0000002.png").exists()


def test_evaluation_prints_and_stores_the_numbers(trained, photos):
    result = run(
        "part=evaluation", "data=folder", f"data.path={photos}", "data.held_out=0.25", f"out={trained}",
        "part.pictures=16", "part.samples=8", "part.steps=2",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    numbers = json.loads((trained / "evaluation.json").read_text())["results"]
    assert {"autoencoder_heldout_psnr", "clip_top1_of_100_trained", "samples_top1_of_100_trained"} <= numbers.keys()
    for name, value in numbers.items():
        assert f"{name} " in result.stdout and str(value) in result.stdout
    assert Image.open(trained / "samples_trained.png").size == (256, 32)


def test_torchrun_trains_the_same_weights(trained, photos, tmp_path):
    result = run(
        "part=autoencoder", "data=folder", f"data.path={photos}", "data.held_out=0.25", f"out={tmp_path}",
        "part.training.steps=2", "part.training.batch_size=4", "part.objective.probes=16", processes=2,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    states = [
        torch.load(out / "training" / "autoencoder.pt", weights_only=True)["trained"] for out in (trained, tmp_path)
    ]
    for name, weight in states[0].items():
        torch.testing.assert_close(states[1][name], weight, atol=1e-4, rtol=1e-3, msg=name)


def test_sizes_of_trained_parts_are_kept(trained):
    stored = json.loads((trained / "config.json").read_text())
    arch = copy.deepcopy(stored)
    arch["vae"]["scale_factor"] = 1.0
    assert reconciled(copy.deepcopy(arch), stored, "unet", trained) == stored
    arch["text"]["width"] = 64
    with pytest.raises(InputError, match=r"arch\.text differs from that of"):
        reconciled(arch, stored, "unet", trained)


def test_mistakes_are_one_line(tmp_path):
    for overrides, message in [
        (["part=unet", f"out={tmp_path}"], "lacks autoencoder.safetensors: train it with"),
        (["part=autoencoder", "data=folder", f"data.path={tmp_path / 'none'}", f"out={tmp_path}"], "none"),
    ]:
        result = run(*overrides)
        assert result.returncode == 1 and message in result.stderr, result.stderr[-2000:]
        assert "Traceback" not in result.stderr and len(result.stderr.strip().splitlines()) == 1, result.stderr
