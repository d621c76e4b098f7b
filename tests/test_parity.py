"""The networks against recorded outputs of an independent implementation, on tiny Stable Diffusion checkpoints.

The weights were rounded to half precision before the outputs were computed in float32, so 1e-4 is rounding only.
"""

import copy
import json

import numpy as np
import pytest
import torch

from models import load
from models.attention import why_not_fused
from samplers import Conditioning, ddim, guided
from tests.conftest import FIXTURES, fixture_arch


@pytest.fixture(scope="module", params=["sd1_tiny", "sd2_tiny"])
def case(request):
    """(model, recorded outputs, guidance scale)."""
    folder = FIXTURES / request.param
    expected = {k: torch.from_numpy(v) for k, v in np.load(folder / "expected.npz").items()}
    scale = json.loads((folder / "arch.json").read_text())["guidance_scale"]
    return load(folder / "model.safetensors", arch=fixture_arch(request.param)), expected, scale


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_text_hidden_states(case):
    model, expected, _ = case
    close(model.text.encode_tokens(expected["token_ids"]), expected["text_hidden"])
    assert model.text.tokenize([""]).tolist() == expected["token_ids"][1:].tolist()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_autoencoder(case, layout):
    model, expected, _ = case
    model = copy.deepcopy(model).to(memory_format=layout)
    mean, logvar = model.autoencoder.posterior(expected["image"])
    close(mean, expected["latent_mean"])
    close(logvar, expected["latent_logvar"])
    close(model.decode_latents(mean.double() * 0.18215), expected["decoded"])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference", "fused"])
def test_unet(case, backend, layout):
    model, expected, _ = case
    if backend == "fused" and (reason := why_not_fused(model.device)):
        pytest.skip(reason)
    unet, raw = copy.deepcopy(model.unet).to(memory_format=layout), expected.get("eps", expected.get("v"))
    unet.attention.backend = backend
    close(unet(expected["x"], expected["t"], unet.project_context(expected["text_hidden"])), raw)
    unet.requires_grad_()  # other products are chosen where a CPU learns
    close(unet(expected["x"], expected["t"], expected["text_hidden"]), raw)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(case, dtype):
    """Some dozens of layers, each rounding by eps / 2 of its output."""
    model, expected, _ = case
    unet, raw = copy.deepcopy(model.unet).to(dtype), expected.get("eps", expected.get("v"))
    found = unet(expected["x"].to(dtype), expected["t"], expected["text_hidden"].to(dtype)).float()
    assert (found - raw).norm() < 4 * torch.finfo(dtype).eps * raw.norm()


def test_guided_ddim_trajectory(case):
    model, expected, scale = case
    trajectory = model.schedule.trajectory(steps=10)
    assert trajectory.timesteps.tolist() == expected["ddim_timesteps"].tolist()
    path = [expected["ddim_cfg3_trajectory"][:1]]
    text, null = expected["text_hidden"].split(1)
    denoise = guided(model, Conditioning(text), scale, Conditioning(null))
    ddim.sample(denoise, path[0], trajectory, callback=lambda i, x: path.append(x))
    close(torch.cat(path), expected["ddim_cfg3_trajectory"])
