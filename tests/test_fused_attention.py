"""The fused attention kernels against float64, in Triton's interpreter or, where there is one, on a GPU."""

from itertools import product

import pytest
import torch
from einops import rearrange
from torch.utils.checkpoint import checkpoint

fused = pytest.importorskip("models.fused_attention", reason="needs Triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities in the interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# ‖actual - exact‖ / ‖exact‖. Sums are float32 sums in every type. The softmax's weights, their gradients and each
# result are rounded to the type: together less than 2 ** -bits times a small number. The interpreter cuts bfloat16 off
# instead of rounding it, which is twice as bad.
TOLERANCE = {torch.float32: 2**-18, torch.float16: 2**-9, torch.bfloat16: 2**-6}


def draw(batch, heads, n, m, d, dtype=torch.float32):
    """q, k, v and the gradient of the output; standard normal."""
    generator = torch.Generator().manual_seed(n * 1000 + m)
    tensors = [torch.randn(batch, heads, length, d, generator=generator) for length in (n, m, m, n)]
    return [x.to(DEVICE, dtype) for x in tensors]


def exact(q, k, v, do):
    """Output and gradients in float64."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    o = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
    return o, *torch.autograd.grad(o, (q, k, v), do.double())


def run(q, k, v, do, call=fused.fused_attention):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o = call(q, k, v)
    return o, *torch.autograd.grad(o, (q, k, v), do)


def assert_close(actual, expected, tolerance):
    """Relative to the norm; for a lone key, whose weight nothing moves, to that of noise of deviation 0.1."""
    lone = expected[2].shape[2] == 1
    for name, a, e in zip(("o", "dq", "dk", "dv"), actual, expected, strict=True):
        assert a.isfinite().all(), name
        error = (a.double() - e).norm() / (e.norm() + lone * 0.1 * e.numel() ** 0.5)
        assert error < tolerance, f"{name}: {error:.1e}"


LAYOUTS = {
    "projection": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "heads apart": lambda x: x,
    "widths apart": lambda x: x.mT.contiguous().mT,
    "expanded": lambda x: x[:1].expand_as(x),
    "padded rows": lambda x: torch.nn.functional.pad(x, (0, 3))[..., : x.shape[-1]],
}


@pytest.mark.parametrize(
    "shape, layout, dtype",
    [
        ((1, 2, 150, 77, 40), "projection", torch.float32),
        ((2, 1, 128, 256, 16), "heads apart", torch.float16),  # whole blocks only
        ((1, 1, 32, 192, 160), "padded rows", torch.bfloat16),
        ((2, 1, 33, 130, 9), "expanded", torch.float32),
        ((2, 2, 1, 1, 8), "widths apart", torch.float32),
        ((1, 1, 1024, 16, 80), "projection", torch.bfloat16),
    ],
)
def test_output_and_gradients_agree_with_float64(shape, layout, dtype):
    tensors = [LAYOUTS[layout](x) for x in draw(*shape, dtype)]
    assert_close(run(*tensors), exact(*tensors), TOLERANCE[dtype])


def test_q_k_and_v_of_one_projection_are_read_as_they_lie_and_heads_join_without_a_copy():
    projection = torch.randn(2, 20, 3 * 2 * 40, device=DEVICE)
    q, k, v = rearrange(projection, "b n (three h d) -> three b h n d", three=3, h=2)
    assert fused._plan(q, k, v, 1)[0][-2] == 8  # the unit: rows begin at multiples of 16 bytes
    o = fused.fused_attention(q, k, v)
    assert rearrange(o, "b h n d -> b n (h d)").data_ptr() == o.data_ptr()
    assert torch.equal(o, fused.fused_attention(q.contiguous(), k.contiguous(), v.contiguous()))


def test_huge_logits_give_the_value_of_the_largest():
    _, k, v, do = draw(1, 1, 100, 100, 16)
    keys = k / k.norm(dim=-1, keepdim=True)  # so that each is its own nearest
    torch.testing.assert_close(fused.fused_attention(1e30 * keys, keys, v), v, atol=1e-6, rtol=0)
    _, dq, dk, dv = run(1e4 * keys, keys, v, do)
    # The weights are made again from the logits, of which the last place is worth 2 ** -12 here.
    assert dv.allclose(do, atol=1e-2) and dq.isfinite().all() and dk.isfinite().all()


def test_keys_that_are_not_there_do_not_count_where_all_logits_are_far_below_zero():
    """The padding of a block has logits of 0, of which e to their distance from the others is infinite."""
    _, k, v, _ = draw(1, 1, 1, 99, 16)
    tensors = torch.full_like(k[:, :, :3], -100.0), k.abs(), v, torch.ones_like(v[:, :, :3])
    for a, e in zip(run(*tensors), exact(*tensors), strict=True):  # a logit's last place is worth 2 ** -15
        torch.testing.assert_close(a.double(), e, atol=1e-2, rtol=1e-3)


def test_frozen_inputs_recomputation_and_compilation_change_no_bit():
    q, k, v, do = draw(2, 2, 20, 30, 16)
    expected = run(q, k, v, do)
    compiled = torch.compile(lambda *qkv: fused.fused_attention(*qkv) * 1, backend="aot_eager")
    recomputed = lambda *qkv: checkpoint(fused.fused_attention, *qkv, use_reentrant=False)
    for call in (fused.fused_attention, compiled, recomputed):
        assert all(torch.equal(a, e) for a, e in zip(run(q, k, v, do, call), expected, strict=True))
    fused.fused_attention(q.requires_grad_(), k, v).backward(do)
    assert torch.equal(q.grad, expected[1]) and k.grad is v.grad is None


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_blocks_fit_the_shared_memory_of_the_smaller_gpus(dtype):
    for width, held in product((16, 32, 64, 128, 256), (1, 2)):
        rows, streamed, _, stages = fused._blocks(width, dtype, "tf32", held, torch.device("cpu"))
        assert (held * rows + 2 * stages * streamed) * width * dtype.itemsize < 99 * 1024
        assert min(rows, streamed) >= 16  # the tensor cores' smallest


def test_inputs_that_it_does_not_take():
    q, k, v, _ = draw(1, 2, 3, 5, 8)
    for bad in ((q.double(), k.double(), v.double()), (q, k, v[:, :, 1:]), (q[:, :1], k, v), (q, k, v.half())):
        with pytest.raises(ValueError, match="cannot take"):
            fused.fused_attention(*bad)
