"""The fused attention kernels against float64, in Triton's interpreter or, where there is one, on a GPU."""

import math
from itertools import product

import pytest
import torch
from einops import rearrange
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from errors import InputError
from models import attention as attention_module
from models.attention import CrossAttention, SelfAttention, attention, use_backend

fused = pytest.importorskip("models.fused_attention", reason="needs Triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities in the interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# ‖actual - exact‖ / ‖exact‖. Sums are float32 sums whatever the type; what is rounded to the type is the softmax's
# weights, their gradients and each result, each to half a unit in the last place: together less than 2 ** -bits times a
# small number. The interpreter cuts bfloat16 off instead of rounding it, which is twice as bad.
TOLERANCE = {torch.float32: 2**-18, torch.float16: 2**-9, torch.bfloat16: 2**-6}


def draw(batch, heads, n, m, d, dtype=torch.float32, seed=0):
    """q, k, v and the gradient of the output; standard normal."""
    generator = torch.Generator().manual_seed(seed)
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
    "fused projection": lambda x: rearrange(x, "b h n d -> b n h d").contiguous().transpose(1, 2),
    "heads apart": lambda x: x.contiguous(),
    "widths apart": lambda x: x.mT.contiguous().mT,
    "expanded": lambda x: x[:1].expand_as(x),
    "padded rows": lambda x: torch.nn.functional.pad(x, (0, 3))[..., : x.shape[-1]],
}


@settings(max_examples=4, deadline=None)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 2),
    n=st.integers(1, 100),
    m=st.integers(1, 200),
    d=st.sampled_from([8, 20, 40, 64, 80, 96, 160]),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 4),
    dtype=st.sampled_from(list(TOLERANCE)),
)
@example(1, 2, 33, 77, 40, ("fused projection",) * 4, torch.float32)
@example(2, 1, 64, 128, 16, ("heads apart",) * 4, torch.float16)
@example(1, 2, 70, 150, 80, ("fused projection",) * 4, torch.float32)
@example(1, 1, 32, 192, 160, ("padded rows",) * 4, torch.bfloat16)
@example(2, 1, 33, 77, 40, ("heads apart", "expanded", "expanded", "expanded"), torch.float32)
@example(2, 1, 20, 140, 16, ("expanded", "expanded", "expanded", "heads apart"), torch.float16)
@example(2, 2, 1, 1, 8, ("widths apart",) * 4, torch.float32)
def test_output_and_gradients_agree_with_float64(batch, heads, n, m, d, layouts, dtype):
    tensors = draw(batch, heads, n, m, d, dtype, seed=n * 1000 + m)
    tensors = [LAYOUTS[name](x) for name, x in zip(layouts, tensors, strict=True)]
    assert_close(run(*tensors), exact(*tensors), TOLERANCE[dtype])


@pytest.mark.parametrize("n, m, d", [(1, 1, 8), (65, 77, 40)])
def test_kernels_for_long_contexts_take_short_ones(monkeypatch, n, m, d):
    monkeypatch.setattr(fused, "SHORT", 0)
    tensors = draw(1, 2, n, m, d)
    assert_close(run(*tensors), exact(*tensors), TOLERANCE[torch.float32])


@pytest.mark.parametrize("n, m", [(16, 4096), (4096, 16), (300, 300)])
def test_long_sequences(n, m):
    tensors = draw(1, 1, n, m, 16, torch.float16)
    assert_close(run(*tensors), exact(*tensors), TOLERANCE[torch.float16])


def test_q_k_and_v_of_one_projection_are_read_in_place_and_heads_join_without_a_copy():
    projection = torch.randn(2, 20, 3 * 2 * 40, device=DEVICE)
    q, k, v = rearrange(projection, "b n (three h d) -> three b h n d", three=3, h=2)
    assert all(x is y for x, y in zip(fused._rows_dense(q, k, v), (q, k, v), strict=True))
    assert fused._strides(q, k, v)[0] == 8  # rows that the compiler knows to begin at multiples of 16 bytes
    o = fused.fused_attention(q, k, v)
    assert rearrange(o, "b h n d -> b n (h d)").data_ptr() == o.data_ptr()
    assert torch.equal(o, fused.fused_attention(q.contiguous(), k.contiguous(), v.contiguous()))


LENGTHS = pytest.mark.parametrize("m", [100, 200])  # one for either form


@LENGTHS
def test_equal_logits_give_the_mean_and_huge_ones_the_largest(m):
    _, k, v, _ = draw(1, 1, 1, m, 16)
    mean = v.mean(2, keepdim=True).expand_as(v)
    for q in (torch.zeros_like(k), k):
        torch.testing.assert_close(fused.fused_attention(q, k[:, :, :1].expand_as(k), v), mean, atol=1e-5, rtol=0)
    keys = k / k.norm(dim=-1, keepdim=True)  # so that each is its own nearest
    torch.testing.assert_close(fused.fused_attention(1e6 * keys, keys, v), v, atol=1e-6, rtol=0)
    torch.testing.assert_close(fused.fused_attention(1e30 * keys, keys, v), v, atol=1e-6, rtol=0)
    _, dq, dk, dv = run(1e4 * keys, keys, v, torch.ones_like(v))
    # The long form makes the weights again from the logits, of which the last place is worth 2 ** -12 here.
    assert dv.allclose(torch.ones_like(v), atol=1e-3) and dq.isfinite().all() and dk.isfinite().all()


@LENGTHS
def test_keys_that_are_not_there_do_not_count_where_all_logits_are_far_below_zero(m):
    """The padding of a block has logits of 0, of which e to their distance from the others is infinite."""
    _, k, v, _ = draw(1, 1, 1, m - 1, 16)
    tensors = torch.full_like(k[:, :, :3], -100.0), k.abs(), v, torch.ones_like(v[:, :, :3])
    for a, e in zip(run(*tensors), exact(*tensors), strict=True):
        torch.testing.assert_close(
            a.double(), e, atol=1e-2, rtol=1e-3
        )  # the last place of the logits is worth 2 ** -15


@LENGTHS
def test_infinite_logits_and_nan_do_as_in_plain_softmax(m):
    q, k, v, do = draw(1, 1, 8, m, 16)
    q[..., 0] = torch.tensor(
        [1.0, -1.0] * 4
    )  # a key with an infinite first channel: half of the logits go up, half down
    k[..., 0] = 0
    minus, plus, all_minus, nan = (k.clone() for _ in range(4))
    minus[:, :, : m - 10, 0] = -math.inf  # more than the first block of keys
    plus[:, :, m - 1, 0] = math.inf
    all_minus[..., 0] = -math.inf
    nan[:, :, m - 1] = math.nan
    down = q.clone()
    down[..., 0] = 1  # all logits of such a key go down: it just does not count, and dv stays finite
    for queries, keys in ((down, minus), (q, minus), (q, plus), (q, all_minus), (q, nan)):
        expected = exact(queries, keys, v, do)
        assert expected[3].isfinite().all() == (queries is down)
        actual = run(queries, keys, v, do)
        for i in (0, 3):  # o and dv; dk and dq have infinity times zero in them
            torch.testing.assert_close(actual[i].double(), expected[i], equal_nan=True, **CLOSE)


CLOSE = dict(atol=1e-5, rtol=1e-5)


@LENGTHS
@pytest.mark.parametrize("which", ["q", "k", "v", "do"])
def test_nan_stays_where_it_is(m, which):
    """NaN of one query stays in its row; of one key, value or head's gradient, in that batch row and head."""
    clean = draw(2, 2, 6, m, 16)
    dirty = [x.clone() for x in clean]
    dirty[["q", "k", "v", "do"].index(which)][0, 1, 3, 5] = math.nan
    before, after = run(*clean), run(*dirty)
    for a, b in zip(after, before, strict=True):
        assert torch.equal(a[1], b[1]) and torch.equal(a[0, 0], b[0, 0])
    if which == "q":
        assert after[0][0, 1, 3].isnan().all() and after[0].isnan().any(-1).sum() == 1
        assert after[1].isnan().any(-1).sum() == 1
    elif which != "do":
        assert after[0][0, 1].isnan().any(-1).all()


@pytest.mark.parametrize("m", [70, 140])
def test_gradients_only_of_what_asks_for_them_and_the_same_bits_each_time(m):
    q, k, v, do = draw(1, 1, 8, m, 16, torch.float16)
    o, *full = run(q, k, v, do)
    again = run(q, k, v, do)
    assert all(torch.equal(a, b) for a, b in zip(again, (o, *full), strict=True))
    saved = (q, k, v) if m <= 128 else (q, k, v, *fused.ops.attention(q, k, v))
    op = fused.ops.short_attention_backward if m <= 128 else fused.ops.attention_backward
    for gradient, expected in zip(op(do, *saved, False, True, False), full, strict=True):
        assert gradient.numel() == 0 or torch.equal(gradient, expected)  # nothing is made that nobody asked for
    for need in product([True, False], repeat=3):
        inputs = [x.detach().requires_grad_(n) for x, n in zip((q, k, v), need, strict=True)]
        if any(need):
            fused.fused_attention(*inputs).backward(do)
        for x, expected, needed in zip(inputs, full, need, strict=True):
            assert torch.equal(x.grad, expected) if needed else x.grad is None


@LENGTHS
def test_hooks_on_saved_tensors_may_lay_them_out_anew_and_second_derivatives_are_refused(m):
    tensors = draw(2, 2, 20, m, 16)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.contiguous(), lambda x: x):
        assert_close(run(*tensors), exact(*tensors), TOLERANCE[torch.float32])
    q, k, v = (x.requires_grad_() for x in tensors[:3])
    with pytest.raises(RuntimeError, match="differentiated only once"):
        torch.autograd.grad(fused.fused_attention(q, k, v).sum(), q, create_graph=True)


def test_rows_further_apart_than_32_bits_reach_are_copied():
    near, far = (torch.empty_strided((1, 1, 3, 8), (1, 1, step, 1), device="meta") for step in (2**29, 2**30))
    kept, copied = fused._rows_dense(near, far)
    assert kept is near and copied.is_contiguous()


@pytest.mark.parametrize("m", [20, 130])
def test_operators_are_what_torch_compile_and_autograd_expect(m):
    q, k, v, do = draw(1, 2, 20, m, 16)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    need, checks = (True, False, True), ("test_schema", "test_faketensor")
    if m <= 128:
        torch.library.opcheck(fused.ops.short_attention.default, leaves)
        torch.library.opcheck(
            fused.ops.short_attention_backward.default, (do, *(x.detach() for x in leaves), *need), test_utils=checks
        )
    else:
        torch.library.opcheck(fused.ops.attention.default, leaves)
        with torch.no_grad():
            saved = (*leaves, *fused.ops.attention(*leaves))
        torch.library.opcheck(
            fused.ops.attention_backward.default, (do, *(x.detach() for x in saved), *need), test_utils=checks
        )


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return SelfAttention(80, 2, 40).to(DEVICE), CrossAttention(80, 24, 2, 40).to(DEVICE)


def through(layers, x, context):
    """Self-attention, then cross-attention; the output and the gradients of everything."""
    attn1, attn2 = layers
    y = x + attn1(x)
    y = y + attn2(y, attn2.project(context))
    parameters = [p for layer in layers for p in layer.parameters()]
    return y, *torch.autograd.grad(y.square().mean(), [x, context, *parameters])


def test_layers_agree_with_plain_attention_eager_compiled_and_recomputed(layers):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 80, generator=generator).to(DEVICE).requires_grad_()
    context = torch.randn(2, 7, 24, generator=generator).to(DEVICE).requires_grad_()
    with use_backend("reference"):
        expected = through(layers, x, context)
    compiled = [torch.compile(layer, backend="aot_eager", fullgraph=True) for layer in layers]
    compiled[1].project = layers[1].project
    recomputed = [lambda *args, layer=layer: checkpoint(layer, *args, use_reentrant=False) for layer in layers]
    with use_backend("fused"):
        y = x + compiled[0](x)
        y = y + compiled[1](y, layers[1].project(context))
        parameters = [p for layer in layers for p in layer.parameters()]
        again = y, *torch.autograd.grad(y.square().mean(), [x, context, *parameters])
        z = x + recomputed[0](x)
        z = z + recomputed[1](z, layers[1].project(context))
        once_more = z, *torch.autograd.grad(z.square().mean(), [x, context, *parameters])
        for actual in (through(layers, x, context), again, once_more):
            for a, e in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_as_for_pytorchs_own(compiled):
    q, k, v, do = draw(1, 2, 20, 30, 16)
    call = fused.fused_attention
    if compiled:
        call = torch.compile(call, backend="aot_eager", fullgraph=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        o, *gradients = run(q, k, v, do.bfloat16(), call)
        assert o.dtype == attention(q, k, v, "sdpa").dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in gradients)
    assert_close((o, *gradients), exact(q, k, v, do), 2 * TOLERANCE[torch.bfloat16])  # the inputs are rounded as well


def test_widths_cover_the_head_in_tensor_core_sizes():
    for d in range(1, 161):
        main, rest = fused._widths(d)
        assert d <= main + rest <= max(16, 1 << (d - 1).bit_length())
        assert all(w == 0 or (w >= 16 and w & (w - 1) == 0) for w in (main, rest))
    assert [fused._widths(d) for d in (40, 64, 80, 160)] == [(32, 16), (64, 0), (64, 16), (128, 32)]


def test_block_sizes_that_are_tried_fit_the_shape():
    configs = fused._configs(({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 2), ({"BLOCK_M": 32, "BLOCK_N": 32}, 4, 2))
    if fused.INTERPRETED.value:
        configs = [fused.triton.Config({"BLOCK_M": m, "BLOCK_N": n}) for m, n in ((128, 64), (32, 32))]
    named = {"N": 4096, "M": 77, "q": torch.empty(0, dtype=torch.float16)}
    assert fused._affordable(configs, named, PRECISION="ieee") == configs
    assert fused._affordable(configs, {**named, "N": 64}, PRECISION="ieee") == configs[1:]
    assert fused._affordable(configs, {**named, "M": 1}, PRECISION="ieee") == configs[1:]  # never none
    single = {**named, "q": torch.empty(0)}
    assert fused._affordable(configs, single, PRECISION="ieee") == configs[1:]
    assert fused._affordable(configs, single, PRECISION="tf32") == configs


def test_full_precision_unless_tf32_is_allowed():
    assert fused._precision(torch.float32) == fused._precision(torch.float16) == "ieee"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert (fused._precision(torch.float32), fused._precision(torch.float16)) == ("tf32", "ieee")
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("m, d, short", [(128, 96, True), (129, 96, False), (64, 160, True), (65, 97, False)])
def test_short_contexts_are_those_whose_keys_and_values_fit_the_chip(m, d, short):
    q, k, v, _ = draw(1, 1, 1, m, d, torch.float16)
    name = fused.fused_attention(q.requires_grad_(), k, v).grad_fn.name()
    assert name == ("_ShortAttentionBackward" if short else "_AttentionBackward")


def test_where_it_cannot_run_it_says_what_would_do(monkeypatch):
    q = torch.zeros(1, 1, 2, 8)
    check = attention_module._why_not_fused
    try:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        check.cache_clear()
        with pytest.raises(InputError, match="CUDA device, not cpu; use attention=auto"):
            attention(q, q, q, "fused")
        monkeypatch.setattr(attention_module, "find_spec", lambda name: None)
        check.cache_clear()
        with pytest.raises(InputError, match="Triton, which is not installed"):
            attention(q, q, q, "fused")
    finally:
        check.cache_clear()


def test_what_it_does_not_take():
    q, k, v, _ = draw(1, 2, 3, 5, 8)
    with pytest.raises(InputError, match="float64"):
        fused.fused_attention(q.double(), k.double(), v.double())
    for bad in ((q, k, v[:, :, 1:]), (q, k[..., :4], v[..., :4]), (q[:, :1], k, v), (q[:, :, :0], k, v)):
        with pytest.raises(ValueError, match="cannot take"):
            fused.fused_attention(*bad)
    with pytest.raises(ValueError, match="one type"):
        fused.fused_attention(q, k.half(), v)
    wide = torch.randn(1, 1, 4, 512, device=DEVICE)  # the autoencoder's one head goes to PyTorch's
    assert torch.equal(attention(wide, wide, wide, "fused"), attention(wide, wide, wide, "sdpa"))
