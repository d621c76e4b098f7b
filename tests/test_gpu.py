"""What only a CUDA device can show. Every test here is skipped where there is none."""

import pytest
import torch

import models
from methods.base import RECONSTRUCTION, Run, perform
from methods.direct_inversion import DirectInversion
from methods.imagic import Imagic
from models.graphs import StepGraph
from samplers import Sampler, ddim, guided
from tests import test_fused_attention as oracle
from tests.conftest import normal

pytestmark = pytest.mark.gpu


@pytest.fixture
def on_gpu(tiny_model, tmp_path):
    """The model as a user has it, from a file: loading leaves CLIP in float32, `.to` would cast everything."""
    models.save(tiny_model, tmp_path / "tiny", dtype=None)
    return lambda dtype: models.load(tmp_path / "tiny", device="cuda", dtype=dtype)


def test_networks_agree_with_the_cpu(tiny_model, on_gpu):
    model, x, t = on_gpu(torch.float32), normal(2, 4, 8, 8).float(), torch.tensor([5, 900])
    texts = [m.encode_text(["a cat", "a red heart"]) for m in (model, tiny_model)]
    torch.testing.assert_close(texts[0].states.cpu(), texts[1].states, atol=1e-3, rtol=1e-3)
    actual = model.predict(x.to("cuda"), t.to("cuda"), texts[0])
    torch.testing.assert_close(actual.cpu(), tiny_model.predict(x, t, texts[1]), atol=5e-3, rtol=5e-3)  # TF32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "method",
    [
        Imagic(Sampler(steps=3), embedding_steps=2, tuning_steps=2, clip_weight=0.1, decoder_steps=1),
        Imagic(Sampler(steps=3), embedding_steps=2, tuning_steps=2, tune="lora", gradient_checkpointing=True),
        DirectInversion(Sampler(steps=3), semantic_coherence=1.0, coherence_steps=2, diversity=0.3),
    ],
)
def test_methods_run_and_give_the_model_back(on_gpu, task, method, dtype):
    model = on_gpu(dtype)
    before = model.fingerprint
    run = Run()
    results = list(perform(method, model, task.to("cuda"), run))
    assert [result[0] == RECONSTRUCTION for result in results] == [False, True]
    for _, latent, image in results:
        assert latent.dtype == torch.float64 and latent.device.type == "cuda"
        assert image.isfinite().all() and image.device.type == "cpu"
    assert model.fingerprint == before
    assert run.metrics.get("replay_error", 0) < 1e-9  # exact in bfloat16 too


SHAPES = [  # batch, heads, queries, keys, width: Stable Diffusion's
    (2, 8, 4096, 4096, 40), (2, 8, 4096, 77, 40), (2, 8, 1024, 1024, 80), (2, 8, 256, 77, 160), (2, 20, 144, 144, 64),
]  # fmt: skip


@pytest.mark.parametrize("dtype", list(oracle.TOLERANCE))
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_attention_agrees_with_float64_also_in_a_cuda_graph(shape, dtype):
    tensors = [oracle.LAYOUTS["projection"](x) for x in oracle.draw(*shape, dtype)]
    actual = oracle.run(*tensors)  # compiles the kernels, too
    for place in ((0, 0), (-1, -1)):
        expected = oracle.exact(*(x[place][None, None] for x in tensors))
        tolerance = max(1e-5, oracle.TOLERANCE[dtype])  # float32's for long sums
        oracle.assert_close([x[place][None, None] for x in actual], expected, tolerance)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = oracle.run(*tensors)
    graph.replay()
    assert all(torch.equal(a, c) for a, c in zip(actual, captured, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replayed_steps_are_eager_steps(on_gpu, dtype):
    model, results = on_gpu(dtype), []
    x = normal(1, 4, 8, 8).to("cuda")
    for forward in (model.unet.forward, StepGraph(model.unet)):
        model.unet.forward = forward
        denoise = guided(model, "a cat", 2.0)
        results.append(ddim.sample(denoise, x, model.schedule.trajectory(8)))
    torch.testing.assert_close(*results, atol=1e-2, rtol=1e-2)
