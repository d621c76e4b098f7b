"""Replaying steps: what is captured, and that nothing stale is replayed. The capture is simulated; see test_gpu.py."""

import copy

import pytest
import torch

from models.graphs import StepGraph
from samplers import ddim, guided
from tests.conftest import normal


@pytest.fixture
def graphed(tiny_model):
    """The model, and a list of the captured steps. As a graph does, a captured step reads the tensors of its capture
    and leaves its result in one place."""
    steps = []

    def capture(work):
        result = work().clone()
        steps.append(work)
        return lambda: result.copy_(work()), result

    model = copy.deepcopy(tiny_model)
    for _ in range(2):  # a model that is kept may be given one again, which takes the other's place
        model.unet.forward = StepGraph(model.unet, capture)
    return model, steps


def sample(model, text):
    return ddim.sample(guided(model, text, 2.0), normal(1, 4, 8, 8), model.schedule.trajectory(6))


def test_replayed_sampling_is_eager_sampling(graphed):
    model, steps = graphed
    texts = ["a cat", "a red heart", "a cat"]
    found = [sample(model, text) for text in texts]
    assert len(steps) == len(texts)  # one for each denoiser
    del model.unet.forward
    assert all(torch.equal(x, sample(model, text)) for x, text in zip(found, texts, strict=True))


def test_hooks_gradients_and_texts_that_serve_once_run_eagerly(graphed):
    model, steps = graphed
    calls, x, t = [], torch.randn(1, *model.latent_shape), torch.tensor([500])
    with torch.no_grad():
        for _ in range(3):
            model.predict(x, 500, model.encode_text(["a cat"]))
    text = model.project(model.encode_text(["a cat"]))
    for _ in range(3):
        model.unet(x.requires_grad_(), t, text).sum().backward()
    with torch.no_grad(), model.unet.attention.hooked(lambda *call: calls.append(call)):
        for _ in range(3):
            model.predict(x, 500, text)
    assert not steps and calls and x.grad is not None


@torch.no_grad()
def test_a_change_of_weights_or_shape_is_seen(graphed):
    model, steps = graphed
    text, x = model.project(model.encode_text(["a cat"])), torch.randn(1, *model.latent_shape)
    before = [model.predict(x, 500, text) for _ in range(3)]
    assert torch.equal(before[0], before[2]) and len(steps) == 1
    next(model.unet.parameters()).add_(0.1)
    after = model.predict(x, 500, text)
    assert not torch.equal(after, before[2]) and len(steps) == 1
    wide = torch.cat([x, x], dim=-1)
    assert [model.predict(wide, t, text).shape for t in (1, 2, 3)] == [wide.shape] * 3
