"""Both methods from a miniature Stable Diffusion checkpoint, in both layouts, through `edit.py`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_edit_cli import REPORT, files_of, run_here

import models
from data.images import read_image, to_pil

FIXTURE = Path(__file__).parent / "fixtures" / "sd1_tiny"
FILE = ["model=sd15", f"model.weights={FIXTURE / 'model.safetensors'}"]
FILE += ["+model.arch.unet.num_heads=4", "+model.arch.text.heads=2"]  # at widths that are not Stable Diffusion's
FOLDER = ["model=sd15", f"model.weights={FIXTURE / 'diffusers'}"]
PHOTO = ["image=photo.jpg", "prompt=a red heart", "size=32", "logger.mode=disabled"]


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """A folder of a user's with a photo that is no square."""
    folder = tmp_path_factory.mktemp("user")
    Image.effect_noise((90, 60), 60).convert("RGB").save(folder / "photo.jpg")
    return folder


def test_imagic_from_a_single_file(user, tmp_path, capsys):
    few = ["sampler.steps=3", "method.embedding_steps=2", "method.tuning_steps=2", "model.vae_slices=2"]
    run_here(user, tmp_path, "method=imagic", *FILE, *PHOTO, *few)
    edit = "edits/00_eta-0.7_sample-0.png"  # the eta that the paper's settings have
    assert files_of(tmp_path) == REPORT | {edit, "plots/loss.png"}
    assert f"contact sheet: {tmp_path / 'sheet.png'}" in capsys.readouterr().out
    assert all(Image.open(tmp_path / name).size == (32, 32) for name in (edit, "input.png", "reconstruction.png"))
    kept = json.loads((tmp_path / "timings.json").read_text())
    assert {"embedding", "tuning", "editing"} <= kept["seconds"].keys()


def test_direct_inversion_from_both_layouts_at_the_pictures_shape(user, tmp_path):
    run = ["method=direct_inversion", "sampler.steps=4", "method.edit_strength=0", "fit=keep"]
    for name, layout in {"file": FILE, "folder": FOLDER}.items():
        run_here(user, tmp_path / name, *layout, *PHOTO, *run)
    edits = [next((tmp_path / name / "edits").iterdir()) for name in ("file", "folder")]
    assert edits[0].read_bytes() == edits[1].read_bytes()
    assert edits[0].read_bytes() == (tmp_path / "file" / "reconstruction.png").read_bytes()
    model = models.load(FIXTURE / "diffusers")
    picture = read_image(user / "photo.jpg", 32, "keep", multiple=4)
    with torch.no_grad():
        through = to_pil(model.decode_latents(model.encode_image(picture)))
    assert through.size == (36, 24)
    difference = np.asarray(through).astype(int) - np.asarray(Image.open(edits[0]))
    assert abs(difference).max() <= 1  # strength 0 is the input, as the autoencoder gives it back
