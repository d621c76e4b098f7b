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


@pytest.fixture(scope="module", params=["sd1_tiny", "sd2_tiny", "sdxl_tiny"])
def case(request):
    """(model, recorded outputs, guidance scale)."""
    folder = FIXTURES / request.param
    expected = {k: torch.from_numpy(v) for k, v in np.load(folder / "expected.npz").items()}
    scale = json.loads((folder / "arch.json").read_text())["guidance_scale"]
    return load(folder / "model.safetensors", arch=fixture_arch(request.param)), expected, scale


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def text_of(expected):
    return Conditioning(expected["text_hidden"], expected.get("pooled"))


def pixels(expected):
    return expected["size_ids"][0, :2].tolist() if "size_ids" in expected else None


def test_text_states_and_vector(case):
    model, expected, _ = case
    ids = [expected[name] for name in ("token_ids", "token_ids_1", "token_ids_2") if name in expected]
    given = [tower.condition(own) for tower, own in zip(model.towers.values(), ids, strict=True)]
    close(torch.cat([each.states for each in given], dim=-1), expected["text_hidden"])
    assert [each.vector is None for each in given] == [True, False][: len(given)]
    if "pooled" in expected:
        close(given[1].vector, expected["pooled"])
    for tower, own in zip(model.towers.values(), ids, strict=True):
        assert tower.tokenize([""]).tolist() == own[1:].tolist()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_autoencoder(case, layout):
    model, expected, _ = case
    model = copy.deepcopy(model).to(memory_format=layout)
    mean, logvar = model.autoencoder.posterior(expected["image"])
    close(mean, expected["latent_mean"])
    close(logvar, expected["latent_logvar"])
    scale = 0.13025 if "pooled" in expected else 0.18215
    assert model.autoencoder.scale_factor == scale
    close(model.decode_latents(mean.double() * scale), expected["decoded"])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference", "fused"])
def test_unet(case, backend, layout):
    model, expected, _ = case
    if backend == "fused" and (reason := why_not_fused(model.device)):
        pytest.skip(reason)
    unet, raw = copy.deepcopy(model.unet).to(memory_format=layout), expected.get("eps", expected.get("v"))
    unet.attention.backend = backend
    text = expected["text_hidden"], expected.get("pooled")
    close(unet(expected["x"], expected["t"], unet.project_context(*text), pixels(expected)), raw)
    unet.requires_grad_()  # other products are chosen where a CPU learns
    close(unet(expected["x"], expected["t"], unet.project_context(*text), pixels(expected)), raw)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(case, dtype):
    """Some dozens of layers, each rounding by eps / 2 of its output."""
    model, expected, _ = case
    unet, raw = copy.deepcopy(model.unet).to(dtype), expected.get("eps", expected.get("v"))
    text = text_of(expected).map(lambda x: x.to(dtype))
    context = unet.project_context(text.states, text.vector)
    found = unet(expected["x"].to(dtype), expected["t"], context, pixels(expected)).float()
    assert (found - raw).norm() < 4 * torch.finfo(dtype).eps * raw.norm()


@pytest.mark.parametrize("empty", ["zeros", "encoded"])
def test_guided_ddim_trajectory(case, empty):
    """SDXL's of both kinds: under zeros, which are its empty prompt, and under the encoded one."""
    model, expected, scale = case
    wanted = expected.get(f"ddim_cfg3_{empty}_trajectory", expected.get("ddim_cfg3_trajectory"))
    if not model.towers.zeros and empty == "zeros":
        pytest.skip("its empty prompt is encoded")
    trajectory = model.schedule.trajectory(steps=10)
    assert trajectory.timesteps.tolist() == expected["ddim_timesteps"].tolist()
    path, text = [wanted[:1]], text_of(expected)
    null = model.encode_text([""]) if empty == "zeros" else text[1]
    ddim.sample(guided(model, text[0], scale, null), path[0], trajectory, callback=lambda i, x: path.append(x))
    close(torch.cat(path), wanted)
