"""What only a CUDA device can show. Every test here is skipped where there is none."""

import copy

import pytest
import torch

from data.tasks import EditTask
from methods.direct_inversion import DirectInversion
from methods.imagic import Imagic
from samplers import Sampler

pytestmark = pytest.mark.gpu


@pytest.fixture
def on_gpu(tiny_model):
    return lambda dtype: copy.deepcopy(tiny_model).to("cuda", dtype)


def task_on(model):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 32, 32, generator=generator) * 2 - 1
    return EditTask(image.to(model.device, model.dtype), "a red heart")


def test_networks_agree_with_the_cpu(tiny_model, on_gpu):
    model = on_gpu(torch.float32)
    x = torch.randn(2, *tiny_model.latent_shape, generator=torch.Generator().manual_seed(0))
    context = tiny_model.encode_text(["a cat", "a red heart"])
    torch.testing.assert_close(model.encode_text(["a cat", "a red heart"]).cpu(), context, atol=1e-3, rtol=1e-3)
    expected = tiny_model.predict_noise(x, torch.tensor([5, 900]), context)
    actual = model.predict_noise(x.cuda(), torch.tensor([5, 900]).cuda(), context.cuda())
    torch.testing.assert_close(actual.cpu(), expected, atol=5e-3, rtol=5e-3)  # TF32 convolutions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "method",
    [
        Imagic(Sampler(steps=3), embedding_steps=2, tuning_steps=2, clip_weight=0.1, decoder_steps=1),
        DirectInversion(Sampler(steps=3), semantic_coherence=1.0, coherence_steps=2, diversity=0.3),
    ],
)
def test_methods_run_and_give_the_model_back(on_gpu, method, dtype):
    model = on_gpu(dtype)
    before = model.fingerprint
    result = method.edit(model, task_on(model))
    assert result.edits[0].image.isfinite().all() and result.edits[0].image.device.type == "cpu"
    assert model.fingerprint == before


def test_replay_is_exact_in_bfloat16(on_gpu):
    model = on_gpu(torch.bfloat16)
    result = DirectInversion(Sampler(steps=5), edit_strength=0.0).edit(model, task_on(model))
    assert result.metrics["replay_error"] < 1e-9
