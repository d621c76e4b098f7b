"""The networks against recorded outputs of an independent implementation, on tiny Stable Diffusion checkpoints, in each
layout in which checkpoints are published.

The weights were rounded to half precision before the outputs were computed in float32, so 1e-4 is rounding only.
"""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models import load
from models.attention import why_not_fused
from samplers import Conditioning, ddim, guided
from tests.conftest import FIXTURES, fixture_arch, hub_folder


def recorded(name):
    return {k: torch.from_numpy(v) for k, v in np.load(FIXTURES / name / "expected.npz").items()}


@pytest.fixture(scope="module", params=["sd1_tiny file", "sd1_tiny hub", "sd2_tiny file", "sd2_tiny ckpt"])
def case(request, tmp_path_factory):
    """(model, recorded outputs, guidance scale)."""
    name, layout = request.param.split()
    path, folder, arch = FIXTURES / name / "model.safetensors", tmp_path_factory.mktemp("parity"), fixture_arch(name)
    if layout == "hub":
        path, arch = hub_folder(folder / "model"), None
    if layout == "ckpt":
        torch.save({"state_dict": load_file(path), "global_step": 3}, folder / "model.ckpt")
        path = folder / "model.ckpt"
    return load(path, arch=arch), recorded(name), json.loads((FIXTURES / name / "arch.json").read_text())


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def raw(expected):
    return expected["eps"] if "eps" in expected else expected["v"]


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
@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
def test_unet(case, backend, layout):
    model, expected, _ = case
    unet = copy.deepcopy(model.unet).to(memory_format=layout)
    unet.attention.backend = backend
    close(unet(expected["x"], expected["t"], expected["text_hidden"]), raw(expected))
    close(unet(expected["x"], expected["t"], unet.project_context(expected["text_hidden"])), raw(expected))
    unet.requires_grad_()  # other products are chosen where a CPU learns
    close(unet(expected["x"], expected["t"], expected["text_hidden"]), raw(expected))


def test_unet_with_fused_attention(case):
    model, expected, _ = case
    if reason := why_not_fused(model.device):
        pytest.skip(reason)
    unet = copy.deepcopy(model.unet)
    unet.attention.backend = "fused"
    close(unet(expected["x"], expected["t"], expected["text_hidden"]), raw(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(dtype):
    """Some dozens of layers, each rounding by eps / 2 of its output."""
    expected = recorded("sd1_tiny")
    model = load(FIXTURES / "sd1_tiny" / "model.safetensors", arch=fixture_arch("sd1_tiny"), dtype=dtype)
    found = model.unet(expected["x"].to(dtype), expected["t"], expected["text_hidden"].to(dtype)).float()
    assert (found - expected["eps"]).norm() < 4 * torch.finfo(dtype).eps * expected["eps"].norm()


def test_guided_ddim_trajectory(case):
    model, expected, arch = case
    trajectory = model.schedule.trajectory(steps=10)
    assert trajectory.timesteps.tolist() == expected["ddim_timesteps"].tolist()
    path = [expected["ddim_cfg3_trajectory"][:1]]
    text, null = expected["text_hidden"].split(1)
    denoise = guided(model, Conditioning(text), arch["guidance_scale"], Conditioning(null))
    ddim.sample(denoise, path[0], trajectory, callback=lambda i, x: path.append(x))
    close(torch.cat(path), expected["ddim_cfg3_trajectory"])
