"""The networks against recorded outputs of an independent implementation, on tiny Stable Diffusion checkpoints.

The weights were rounded to half precision before the outputs were computed in float32, so 1e-4 is rounding only.
"""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from models import layers, load
from models.attention import use_backend, why_not_fused
from samplers import ddim, guided

FIXTURES = Path(__file__).parent / "fixtures"


SOURCES = ["sd1_tiny/model.safetensors", "sd1_tiny/diffusers", "sd2_tiny/model.safetensors"]


def read(source, **settings):
    path = FIXTURES / source
    arch = json.loads((path.parent / "arch.json").read_text())
    expected = {k: torch.from_numpy(v) for k, v in np.load(path.parent / "expected.npz").items()}
    return load(path, arch=arch if path.is_file() else None, **settings), expected, arch


@pytest.fixture(scope="module", params=SOURCES)
def loaded(request):
    return read(request.param)


def take_own_convolutions(monkeypatch):
    monkeypatch.setattr(layers, "MANY", 1)
    monkeypatch.setattr(layers, "SMALL", 16)


@pytest.fixture(params=["contiguous", "channels last", "own convolutions"])
def case(loaded, request, monkeypatch):
    """Every layout, and the convolutions of models/layers.py, for which these networks would be too narrow."""
    contiguous, ours = request.param == "contiguous", request.param == "own convolutions"
    loaded[0].to(memory_format=torch.contiguous_format if contiguous else torch.channels_last)
    if ours:
        take_own_convolutions(monkeypatch)
    with torch.set_grad_enabled(not ours):
        yield loaded


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


@pytest.mark.parametrize("source", [SOURCES[0], SOURCES[2]])
def test_unet_with_fused_attention(source):
    model, expected, _ = read(source)
    if reason := why_not_fused(model.device):
        pytest.skip(reason)
    with torch.no_grad(), use_backend("fused"):
        raw = model.unet(expected["x"], expected["t"], expected["text_hidden"])
    close(raw, expected["eps"] if "eps" in expected else expected["v"])


def test_own_convolutions_are_all_there(monkeypatch):
    """That is, the cases above take them: both kinds, and torch's for what is neither."""
    taken = {"winograd": 0, "as_product": 0}
    model, expected, _ = read(SOURCES[0])
    model.to(memory_format=torch.channels_last)
    take_own_convolutions(monkeypatch)
    for name in taken:

        def counted(*arguments, own=getattr(layers, name), name=name):
            taken[name] += 1
            return own(*arguments)

        monkeypatch.setattr(layers, name, counted)
    with torch.no_grad():
        model.unet(expected["x"], expected["t"], expected["text_hidden"])
    assert all(taken.values()), taken


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(dtype):
    """Some dozens of layers, each rounding by eps / 2 of what it gives."""
    model, expected, _ = read(SOURCES[0], dtype=dtype)
    with torch.no_grad():
        raw = model.unet(expected["x"].to(dtype), expected["t"], expected["text_hidden"].to(dtype)).float()
    assert (raw - expected["eps"]).norm() < 4 * torch.finfo(dtype).eps * expected["eps"].norm()


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_compiled_it_is_the_same_and_one_graph(tiny_model, dtype, rounding):
    """Traced whole, with its backward pass, by what `compile=true` traces with; and once for all timesteps."""
    x, context = torch.randn(2, 4, 8, 8, dtype=dtype), torch.randn(2, 24, 32, dtype=dtype)
    unet, graphs = copy.deepcopy(tiny_model.unet).to(dtype), []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(unet, backend=keep, fullgraph=True)
    with torch.no_grad():
        for t in (torch.tensor(3), torch.tensor(700)):
            torch.testing.assert_close(compiled(x, t, context), unet(x, t, context), atol=rounding, rtol=rounding)
    assert len(graphs) == 1


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
