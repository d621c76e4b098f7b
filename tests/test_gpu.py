"""What only a CUDA device can show. Every test here is skipped where there is none."""

import pytest
import torch

import models
from methods.base import RECONSTRUCTION, Run, perform
from methods.direct_inversion import DirectInversion
from methods.imagic import Imagic
from models.attention import attention
from samplers import Sampler

pytestmark = pytest.mark.gpu


@pytest.fixture
def on_gpu(tiny_model, tmp_path):
    """The model as a user has it, from a file: loading leaves CLIP in float32, `.to` would cast everything."""
    models.save(tiny_model, tmp_path / "tiny", dtype=None)
    return lambda dtype: models.load(tmp_path / "tiny", device="cuda", dtype=dtype)


def latents(model):
    """Two of them on the CPU, normal."""
    return torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))


def test_networks_agree_with_the_cpu(tiny_model, on_gpu):
    model, x, t = on_gpu(torch.float32), latents(tiny_model), torch.tensor([5, 900])
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
    results = list(perform(method, model, task.to("cuda"), Run()))
    assert [result[0] == RECONSTRUCTION for result in results] == [False, True]
    for _, latent, image in results:
        assert latent.dtype == torch.float64 and latent.device.type == "cuda"
        assert image.isfinite().all() and image.device.type == "cpu"
    assert model.fingerprint == before


def test_replay_is_exact_in_bfloat16(on_gpu, task):
    run, method = Run(), DirectInversion(Sampler(steps=5), edit_strength=0.0)
    list(perform(method, on_gpu(torch.bfloat16), task.to("cuda"), run))
    assert run.metrics["replay_error"] < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_step_waits_for_the_device(on_gpu, dtype):
    """The model predicts v, so that a step also asks the schedule for its numbers."""
    model = on_gpu(dtype)
    x, projected = latents(model).to("cuda"), model.project(model.encode_text(["a cat", "a red heart"]))
    model.predict(x, 500, projected)  # loads its libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.predict(x, 501, projected)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ‖actual - exact‖ / ‖exact‖, as in test_fused_attention.py: a few units in the last place, float32's for long sums
FUSED_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
FUSED_SHAPES = [  # batch, heads, queries, keys, width: Stable Diffusion's, and odd ones
    *((2, 8, 4096, 4096, 40), (2, 8, 4096, 77, 40), (2, 8, 1024, 1024, 80), (2, 8, 256, 77, 160), (2, 8, 64, 64, 160)),
    *((2, 5, 9216, 77, 64), (2, 20, 144, 144, 64), (1, 3, 1000, 333, 72), (3, 1, 130, 129, 9), (1, 2, 5, 1, 8)),
]


def fused_inputs(batch, heads, n, m, d, dtype):
    """q, k, v and the gradient of the output, as views of (B, N, heads, d), which is how projections lie."""
    torch.manual_seed(0)
    return [torch.randn(batch, x, heads, d, device="cuda").to(dtype).transpose(1, 2) for x in (n, m, m, n)]


def with_gradients(q, k, v, do, call=attention):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o = call(q, k, v, "fused")
    return o, *torch.autograd.grad(o, (q, k, v), do)


@pytest.mark.parametrize("dtype", list(FUSED_TOLERANCE))
@pytest.mark.parametrize("shape", FUSED_SHAPES)
def test_fused_attention_agrees_with_float64_and_repeats_its_bits(shape, dtype):
    tensors = fused_inputs(*shape, dtype)
    actual = with_gradients(*tensors)
    for b, h in ((0, 0), (-1, -1)):
        q, k, v = (x[b, h].double().requires_grad_() for x in tensors[:3])
        o = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        expected = o, *torch.autograd.grad(o, (q, k, v), tensors[3][b, h].double())
        for a, e in zip(actual, expected, strict=True):
            floor = 0.1 * e.numel() ** 0.5 if shape[3] == 1 else 0  # nothing moves the weight of a lone key
            assert (a[b, h].double() - e).norm() < FUSED_TOLERANCE[dtype] * (e.norm() + floor)
    assert all(torch.equal(a, b) for a, b in zip(with_gradients(*tensors), actual, strict=True))


@pytest.mark.parametrize("m", [77, 1024])
def test_fused_attention_in_a_cuda_graph_compiled_and_with_nan(m):
    q, k, v, do = fused_inputs(2, 8, 1024, m, 40, torch.bfloat16)
    expected = with_gradients(q, k, v, do)  # compiles the kernels, too
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = with_gradients(q, k, v, do)
    graph.replay()
    compiled = with_gradients(q, k, v, do, torch.compile(attention, fullgraph=True))
    for actual in (captured, compiled):
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    q = q.clone()
    q[0, 0, 7, 3] = float("nan")
    o, dq, dk, _ = with_gradients(q, k, v, do)
    assert o.isnan().any(-1).sum() == dq.isnan().any(-1).sum() == 1
    assert not dk[1].isnan().any() and not dk[0, 1:].isnan().any()


def test_the_unet_gives_the_same_with_fused_attention(on_gpu):
    model, outputs = on_gpu(torch.float16), []
    x, text = latents(model).to("cuda"), model.encode_text(["a cat", "a red heart"])
    for backend in ("fused", "reference"):
        model.unet.attention.backend = backend
        outputs.append(model.predict(x, 500, text))
    torch.testing.assert_close(*outputs, atol=1e-2, rtol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layout_and_compilation_change_rounding_only(on_gpu, dtype, compiled):
    plain, other = on_gpu(dtype), on_gpu(dtype).to(memory_format=torch.channels_last)
    if compiled:
        other.unet.compile()
    x, text = latents(plain).to("cuda"), plain.encode_text(["a cat", "a red heart"])
    for t in (900, 5):
        expected, found = (model.predict(x, t, text) for model in (plain, other))
        assert (found - expected).norm() < (5e-3 if dtype == torch.float32 else 5e-2) * expected.norm()
