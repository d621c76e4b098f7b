"""The networks against recorded outputs of an independent implementation, on tiny Stable Diffusion checkpoints.

The weights were rounded to half precision before the outputs were computed in float32, so 1e-4 is rounding only.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from models import load
from models.attention import use_backend
from samplers import ddim, guided

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(
    scope="module", params=["sd1_tiny/model.safetensors", "sd1_tiny/diffusers", "sd2_tiny/model.safetensors"]
)
def case(request):
    path = FIXTURES / request.param
    arch = json.loads((path.parent / "arch.json").read_text())
    expected = {k: torch.from_numpy(v) for k, v in np.load(path.parent / "expected.npz").items()}
    return load(path, arch=arch if path.is_file() else None), expected, arch


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_text_hidden_states(case):
    model, expected, _ = case
    close(model.text.encode_tokens(expected["token_ids"]), expected["text_hidden"])


def test_autoencoder(case):
    model, expected, _ = case
    mean, logvar = model.autoencoder.posterior(expected["image"])
    close(mean, expected["latent_mean"])
    close(logvar, expected["latent_logvar"])
    close(model.decode_latents(mean * 0.18215), expected["decoded"])


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_unet(case, backend):
    model, expected, _ = case
    raw = expected["eps"] if "eps" in expected else expected["v"]
    with use_backend(backend):
        close(model.unet(expected["x"], expected["t"], expected["text_hidden"]), raw)


def test_projected_text_is_the_same(case):
    model, expected, _ = case
    projected = model.project_context(expected["text_hidden"])
    torch.testing.assert_close(
        model.unet(expected["x"], expected["t"], projected),
        model.unet(expected["x"], expected["t"], expected["text_hidden"]),
    )


def test_guided_ddim_trajectory(case):
    model, expected, arch = case
    trajectory = model.schedule.trajectory(steps=10)
    assert trajectory.timesteps.tolist() == expected["ddim_timesteps"].tolist()
    path = [expected["ddim_cfg3_trajectory"][:1]]
    text, null = expected["text_hidden"].split(1)
    ddim.sample(
        guided(model, text, null, arch["guidance_scale"]),
        path[0],
        trajectory,
        callback=lambda i, x: path.append(x),
    )
    close(torch.cat(path), expected["ddim_cfg3_trajectory"])
