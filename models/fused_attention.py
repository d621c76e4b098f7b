"""Attention in one kernel, forward and backward, without the N x M matrix in memory; written in Triton.

Long contexts follow FlashAttention-2 (Dao, 2023): online softmax over blocks of keys, the log-sum-exp kept for the
backward pass, which makes the weights again from it. Contexts of at most `SHORT` keys (half of that for wide heads),
such as a text's 77 tokens, have kernels of their own: all keys and values of a head stay on the chip, the softmax is
done at once, nothing but q, k and v is kept, and one pass gives all three gradients.

Nothing here adds atomically, so with the same block sizes equal inputs give equal bits; sums across programs are
written out and added in a fixed order. Products accumulate in float32. q, k and v are read where they lie (say, in one
fused projection): only their last dimension has to be contiguous. The output lies in memory as (B, N, heads, d), so
that joining the heads is a view.

A head width that is no power of two is cut in two: 40 = 32 + 16 (half of it empty: the tensor cores take no less), 80 =
64 + 16, 160 = 128 + 32. Padding them to 64, 128 and 256 instead would mean 1.3 to 1.6 times the arithmetic, and
accumulators that no longer fit the registers.

The first call for a new shape tries a few block sizes and keeps the fastest, in this process and in Triton's cache on
disk; so call once before capturing a CUDA graph.
"""

from __future__ import annotations

import functools
import inspect
import math
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from errors import InputError
from models.attention import WIDEST

# Keys, up to which the kernels for short contexts serve; half of them for heads of more than 96 channels, or they would
# not fit the 99 KB of shared memory of the smaller GPUs. On a GPU not for float32, whose full-precision products are
# unrolled over the registers: 128 keys do not fit there, and compiling takes half a minute.
SHORT = 128

# Triton's interpreter, for tests on the CPU. It cannot multiply bfloat16 matrices, so there `_dot` widens them first.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


# --- pieces of the kernels -----------------------------------------------------------------------------------------


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """a b, plus acc if that is not None; float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _dot_rows(a0, a1, b0, b1, W1: tl.constexpr, PRECISION: tl.constexpr):
    """a bᵀ of two matrices whose columns come in two parts."""
    product = _dot(a0, tl.trans(b0), None, PRECISION)
    if W1 > 0:
        product = _dot(a1, tl.trans(b1), product, PRECISION)
    return product


@triton.jit
def _load_part(base, rows, stride, length, FIRST: tl.constexpr, W: tl.constexpr, D: tl.constexpr, WHOLE: tl.constexpr):
    """Columns FIRST to FIRST + W of some rows of a matrix; zeros past `length` rows (never if WHOLE) and D columns."""
    columns = FIRST + tl.arange(0, W)
    at = base + rows[:, None] * stride + columns[None, :]
    if FIRST + W <= D:
        if WHOLE:
            return tl.load(at)
        else:
            return tl.load(at, mask=rows[:, None] < length, other=0.0)
    else:
        if WHOLE:
            return tl.load(at, mask=columns[None, :] < D, other=0.0)
        else:
            return tl.load(at, mask=(rows[:, None] < length) & (columns[None, :] < D), other=0.0)


@triton.jit
def _load(base, rows, stride, length, D: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, WHOLE: tl.constexpr):
    """Some rows of a matrix of D columns, as its first W0 columns and the W1 after them (if W1 is 0, ignore those)."""
    x0 = _load_part(base, rows, stride, length, 0, W0, D, WHOLE)
    x1 = x0
    if W1 > 0:
        x1 = _load_part(base, rows, stride, length, W0, W1, D, WHOLE)
    return x0, x1


@triton.jit
def _store(base, rows, stride, length, x0, x1, D: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr):
    """The reverse of `_load`."""
    columns = tl.arange(0, W0)
    at = base + rows[:, None] * stride + columns[None, :]
    tl.store(at, x0.to(base.dtype.element_ty), mask=(rows[:, None] < length) & (columns[None, :] < D))
    if W1 > 0:
        columns = W0 + tl.arange(0, W1)
        at = base + rows[:, None] * stride + columns[None, :]
        tl.store(at, x1.to(base.dtype.element_ty), mask=(rows[:, None] < length) & (columns[None, :] < D))


@triton.jit
def _zeros(ROWS: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr):
    return tl.zeros((ROWS, W0), tl.float32), tl.zeros((ROWS, W1 if W1 > 0 else 16), tl.float32)


@triton.jit
def _add_product(acc0, acc1, a, b0, b1, W1: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b, for b and acc in two parts; a is rounded to b's type."""
    a = a.to(b0.dtype)
    acc0 = _dot(a, b0, acc0, PRECISION)
    if W1 > 0:
        acc1 = _dot(a, b1, acc1, PRECISION)
    return acc0, acc1


@triton.jit
def _head(base, bh, heads, stride_b, stride_h, UNIT: tl.constexpr):
    """Where the matrix of one head of one batch row begins. Strides come in units of UNIT elements; see `_strides`."""
    return base + (bh // heads).to(tl.int64) * stride_b * UNIT + (bh % heads).to(tl.int64) * stride_h * UNIT


@triton.jit
def _dense_head(base, bh, heads, length, D: tl.constexpr):
    """The same for a tensor that lies as (B, length, heads, D)."""
    return base + (bh // heads).to(tl.int64) * length * heads * D + (bh % heads) * D


# --- contexts of any length ----------------------------------------------------------------------------------------


def _forward(
    q, k, v, o, lse, N, M, heads, scale, sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, shape,
    D: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    DEVICE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE_M: tl.constexpr, WHOLE_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head against all keys, in blocks of BLOCK_N. Logits are in base 2."""
    blocks = tl.cdiv(N, BLOCK_M)
    bh = tl.program_id(0) // blocks
    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    k = _head(k, bh, heads, skb, skh, UNIT)
    v = _head(v, bh, heads, svb, svh, UNIT)
    q0, q1 = _load(_head(q, bh, heads, sqb, sqh, UNIT), rows, sqn * UNIT, N, D, W0, W1, WHOLE_M)
    acc0, acc1 = _zeros(BLOCK_M, W0, W1)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, M, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k0, k1 = _load(k, keys, skn * UNIT, M, D, W0, W1, WHOLE_N)
        s = _dot_rows(q0, q1, k0, k1, W1, PRECISION)
        if not WHOLE_N:
            s = tl.where(keys[None, :] < M, s, -float("inf"))
        new_top = tl.maximum(top, tl.max(s, 1) * scale)
        # While every logit of a row was -inf there is nothing to subtract: -inf - -inf would make NaN of later keys.
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        p = tl.exp2(s * scale - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(p, 1)
        acc0 *= shrink[:, None]
        if W1 > 0:
            acc1 *= shrink[:, None]
        v0, v1 = _load(v, keys, svn * UNIT, M, D, W0, W1, WHOLE_N)
        acc0, acc1 = _add_product(acc0, acc1, p, v0, v1, W1, PRECISION)
        top = new_top
    acc0 /= total[:, None]
    if W1 > 0:
        acc1 /= total[:, None]
    _store(_dense_head(o, bh, heads, N, D), rows, heads * D, N, acc0, acc1, D, W0, W1)
    tl.store(lse + bh.to(tl.int64) * N + rows, top + tl.log2(total), mask=rows < N)


@triton.jit
def _row_products(
    o, do, delta, N, heads, sdb, sdh, sdn,
    D: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta = the sum of o * do over each row, which the softmax's gradient subtracts (FlashAttention-2, 3.1)."""
    blocks = tl.cdiv(N, BLOCK_M)
    bh = tl.program_id(0) // blocks
    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    o0, o1 = _load(_dense_head(o, bh, heads, N, D), rows, heads * D, N, D, W0, W1, False)
    g0, g1 = _load(_head(do, bh, heads, sdb, sdh, UNIT), rows, sdn * UNIT, N, D, W0, W1, False)
    products = tl.sum(o0.to(tl.float32) * g0.to(tl.float32), 1)
    if W1 > 0:
        products += tl.sum(o1.to(tl.float32) * g1.to(tl.float32), 1)
    tl.store(delta + bh.to(tl.int64) * N + rows, products, mask=rows < N)


def _backward_q(
    q, k, v, do, dq, lse, delta, N, M, heads, scale, natural_scale,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sdb, sdh, sdn, shape,
    D: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    DEVICE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE_M: tl.constexpr, WHOLE_N: tl.constexpr,
):  # fmt: skip
    """One program: dq of BLOCK_M queries of one head, over all keys."""
    blocks = tl.cdiv(N, BLOCK_M)
    bh = tl.program_id(0) // blocks
    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    k = _head(k, bh, heads, skb, skh, UNIT)
    v = _head(v, bh, heads, svb, svh, UNIT)
    q0, q1 = _load(_head(q, bh, heads, sqb, sqh, UNIT), rows, sqn * UNIT, N, D, W0, W1, WHOLE_M)
    g0, g1 = _load(_head(do, bh, heads, sdb, sdh, UNIT), rows, sdn * UNIT, N, D, W0, W1, WHOLE_M)
    row_lse = tl.load(lse + bh.to(tl.int64) * N + rows, mask=rows < N, other=0.0)
    row_delta = tl.load(delta + bh.to(tl.int64) * N + rows, mask=rows < N, other=0.0)
    acc0, acc1 = _zeros(BLOCK_M, W0, W1)
    for start in range(0, M, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k0, k1 = _load(k, keys, skn * UNIT, M, D, W0, W1, WHOLE_N)
        v0, v1 = _load(v, keys, svn * UNIT, M, D, W0, W1, WHOLE_N)
        p = tl.exp2(_dot_rows(q0, q1, k0, k1, W1, PRECISION) * scale - row_lse[:, None])
        if not WHOLE_N:  # a key that is not there has the logit 0, of which the exponential may well be infinite
            p = tl.where(keys[None, :] < M, p, 0.0)
        ds = p * (_dot_rows(g0, g1, v0, v1, W1, PRECISION) - row_delta[:, None])
        acc0, acc1 = _add_product(acc0, acc1, ds, k0, k1, W1, PRECISION)
    dq = _dense_head(dq, bh, heads, N, D)
    _store(dq, rows, heads * D, N, acc0 * natural_scale, acc1 * natural_scale, D, W0, W1)


def _backward_kv(
    q, k, v, do, dk, dv, lse, delta, N, M, heads, scale, natural_scale,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sdb, sdh, sdn, shape,
    D: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    DEVICE: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE_M: tl.constexpr, WHOLE_N: tl.constexpr,
):  # fmt: skip
    """One program: dk and dv of BLOCK_N keys of one head, over all queries. Weights are held transposed, keys first."""
    blocks = tl.cdiv(M, BLOCK_N)
    bh = tl.program_id(0) // blocks
    keys = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    q = _head(q, bh, heads, sqb, sqh, UNIT)
    do = _head(do, bh, heads, sdb, sdh, UNIT)
    lse += bh.to(tl.int64) * N
    delta += bh.to(tl.int64) * N
    k0, k1 = _load(_head(k, bh, heads, skb, skh, UNIT), keys, skn * UNIT, M, D, W0, W1, WHOLE_N)
    v0, v1 = _load(_head(v, bh, heads, svb, svh, UNIT), keys, svn * UNIT, M, D, W0, W1, WHOLE_N)
    dk0, dk1 = _zeros(BLOCK_N, W0, W1)
    dv0, dv1 = _zeros(BLOCK_N, W0, W1)
    for start in range(0, N, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q0, q1 = _load(q, rows, sqn * UNIT, N, D, W0, W1, WHOLE_M)
        g0, g1 = _load(do, rows, sdn * UNIT, N, D, W0, W1, WHOLE_M)
        row_lse = tl.load(lse + rows, mask=rows < N, other=0.0)
        p = tl.exp2(_dot_rows(k0, k1, q0, q1, W1, PRECISION) * scale - row_lse[None, :])
        if not WHOLE_M:  # a query that is not there must not count, not even where a key is infinite
            p = tl.where(rows[None, :] < N, p, 0.0)
        if NEED_V:
            dv0, dv1 = _add_product(dv0, dv1, p, g0, g1, W1, PRECISION)
        if NEED_K:
            row_delta = tl.load(delta + rows, mask=rows < N, other=0.0)
            ds = p * (_dot_rows(v0, v1, g0, g1, W1, PRECISION) - row_delta[None, :])
            dk0, dk1 = _add_product(dk0, dk1, ds, q0, q1, W1, PRECISION)
    if NEED_V:
        _store(_dense_head(dv, bh, heads, M, D), keys, heads * D, M, dv0, dv1, D, W0, W1)
    if NEED_K:
        dk = _dense_head(dk, bh, heads, M, D)
        _store(dk, keys, heads * D, M, dk0 * natural_scale, dk1 * natural_scale, D, W0, W1)


# --- short contexts ------------------------------------------------------------------------------------------------


@triton.jit
def _softmax(s, scale, present, AXIS: tl.constexpr, WHOLE_N: tl.constexpr):
    """Weights of all keys, which lie along AXIS, at once; logits in base 2 after scaling."""
    s = s * scale
    if not WHOLE_N:
        s = tl.where(present, s, -float("inf"))
    p = tl.exp2(s - tl.expand_dims(tl.max(s, AXIS), AXIS))
    return p / tl.expand_dims(tl.sum(p, AXIS), AXIS)


def _short_forward(
    q, k, v, o, N, M, heads, scale, sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, shape,
    D: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    DEVICE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, REPEATS: tl.constexpr, WHOLE_M: tl.constexpr, WHOLE_N: tl.constexpr,
):  # fmt: skip
    """One program: REPEATS blocks of BLOCK_M queries of one head, against keys and values that are loaded once."""
    groups = tl.cdiv(N, BLOCK_M * REPEATS)
    bh = tl.program_id(0) // groups
    first = tl.program_id(0) % groups * (BLOCK_M * REPEATS)
    q = _head(q, bh, heads, sqb, sqh, UNIT)
    o = _dense_head(o, bh, heads, N, D)
    keys = tl.arange(0, BLOCK_N)
    k0, k1 = _load(_head(k, bh, heads, skb, skh, UNIT), keys, skn * UNIT, M, D, W0, W1, WHOLE_N)
    v0, v1 = _load(_head(v, bh, heads, svb, svh, UNIT), keys, svn * UNIT, M, D, W0, W1, WHOLE_N)
    for start in range(first, min(first + BLOCK_M * REPEATS, N), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q0, q1 = _load(q, rows, sqn * UNIT, N, D, W0, W1, WHOLE_M)
        p = _softmax(_dot_rows(q0, q1, k0, k1, W1, PRECISION), scale, keys[None, :] < M, 1, WHOLE_N)
        o0, o1 = _zeros(BLOCK_M, W0, W1)
        o0, o1 = _add_product(o0, o1, p, v0, v1, W1, PRECISION)
        _store(o, rows, heads * D, N, o0, o1, D, W0, W1)


def _short_backward(
    q, k, v, do, dq, partial, N, M, heads, scale, natural_scale, part_rows, parts, part_stride,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sdb, sdh, sdn, shape,
    D: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    DEVICE: tl.constexpr, NEED_Q: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, WHOLE_M: tl.constexpr, WHOLE_N: tl.constexpr,
):  # fmt: skip
    """One program: one part of the queries of one head: their dq, and their share of dk and dv.

    Weights are held transposed, keys first, which spares turning them for dk and dv. `partial` is
    (parts, 2, B, M, heads, D), dk first: the caller adds up the parts, `part_stride` elements are from dk to dv.
    """
    bh = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    first = part * part_rows
    q = _head(q, bh, heads, sqb, sqh, UNIT)
    do = _head(do, bh, heads, sdb, sdh, UNIT)
    dq = _dense_head(dq, bh, heads, N, D)
    keys = tl.arange(0, BLOCK_N)
    k0, k1 = _load(_head(k, bh, heads, skb, skh, UNIT), keys, skn * UNIT, M, D, W0, W1, WHOLE_N)
    v0, v1 = _load(_head(v, bh, heads, svb, svh, UNIT), keys, svn * UNIT, M, D, W0, W1, WHOLE_N)
    dk0, dk1 = _zeros(BLOCK_N, W0, W1)
    dv0, dv1 = _zeros(BLOCK_N, W0, W1)
    for start in range(first, min(first + part_rows, N), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q0, q1 = _load(q, rows, sqn * UNIT, N, D, W0, W1, WHOLE_M)
        g0, g1 = _load(do, rows, sdn * UNIT, N, D, W0, W1, WHOLE_M)
        p = _softmax(_dot_rows(k0, k1, q0, q1, W1, PRECISION), scale, keys[:, None] < M, 0, WHOLE_N)
        if not WHOLE_M:
            p = tl.where(rows[None, :] < N, p, 0.0)
        if NEED_V:
            dv0, dv1 = _add_product(dv0, dv1, p, g0, g1, W1, PRECISION)
        if NEED_Q or NEED_K:
            dp = _dot_rows(v0, v1, g0, g1, W1, PRECISION)
            ds = (p * (dp - tl.sum(p * dp, 0)[None, :])).to(q0.dtype)
            if NEED_K:
                dk0, dk1 = _add_product(dk0, dk1, ds, q0, q1, W1, PRECISION)
            if NEED_Q:
                dq0, dq1 = _zeros(BLOCK_M, W0, W1)
                dq0, dq1 = _add_product(dq0, dq1, tl.trans(ds), k0, k1, W1, PRECISION)
                _store(dq, rows, heads * D, N, dq0 * natural_scale, dq1 * natural_scale, D, W0, W1)
    partial = _dense_head(partial + part.to(tl.int64) * (2 * part_stride), bh, heads, M, D)
    if NEED_K:
        _store(partial, keys, heads * D, M, dk0 * natural_scale, dk1 * natural_scale, D, W0, W1)
    if NEED_V:
        _store(partial + part_stride, keys, heads * D, M, dv0, dv1, D, W0, W1)


# --- block sizes ---------------------------------------------------------------------------------------------------


def _configs(*choices: tuple[dict[str, int], int, int]) -> list[triton.Config]:
    configs = [triton.Config(sizes, num_warps=warps, num_stages=stages) for sizes, warps, stages in choices]
    if INTERPRETED.value:  # nothing to time there: one choice, with blocks of unequal sides
        small = {"BLOCK_M": 64, "BLOCK_N": 128, "REPEATS": 2}
        configs = [triton.Config({name: small[name] for name in configs[0].kwargs})]
    return configs


def _affordable(configs: list[triton.Config], named: dict, **sizes) -> list[triton.Config]:
    """The choices worth trying: no blocks of twice the length or more, and small ones for full-precision products.

    Those run without tensor cores, unrolled: large blocks take minutes to compile, and spill.
    """
    named = {**named, **sizes}
    longest = {"BLOCK_M": max(64, triton.next_power_of_2(named["N"])), "BLOCK_N": triton.next_power_of_2(named["M"])}
    if named["q"].dtype == torch.float32 and named["PRECISION"] == "ieee":
        longest = {"BLOCK_M": 32, "BLOCK_N": 32}
    fit = [c for c in configs if all(c.kwargs.get(name, 0) <= most for name, most in longest.items())]
    return fit or [min(configs, key=lambda c: c.kwargs["BLOCK_M"] * c.kwargs.get("BLOCK_N", 1))]


_KEY = ("shape", "D", "UNIT", "PRECISION", "DEVICE", "NEED_Q", "NEED_K", "NEED_V")


def _tuned(kernel, *choices: tuple[dict[str, int], int, int]):
    """Compile `kernel`, with the fastest of the (sizes, warps, stages) in `choices` for each kind of shape and device.

    `shape` in the key is the lengths and the number of heads, rounded up to powers of two: see `_shape`.
    """
    wholes = {
        "WHOLE_M": lambda a: a["N"] % a["BLOCK_M"] == 0,
        "WHOLE_N": lambda a: a["M"] % a["BLOCK_N"] == 0,
    }
    keep = {"cache_results": True} if "cache_results" in inspect.signature(triton.autotune).parameters else {}
    tune = triton.autotune(
        configs=_configs(*choices),
        key=[n for n in inspect.signature(kernel).parameters if n in _KEY],
        prune_configs_by={"early_config_prune": _affordable},
        do_bench=_time,
        **keep,
    )
    return tune(triton.heuristics(wholes)(triton.jit(kernel, do_not_specialize=["shape"])))


def _time(call, quantiles):
    return triton.testing.do_bench(call, warmup=5, rep=20, quantiles=quantiles)  # milliseconds


forward_kernel = _tuned(
    _forward,
    ({"BLOCK_M": 128, "BLOCK_N": 128}, 8, 2),
    ({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 3),
    ({"BLOCK_M": 128, "BLOCK_N": 64}, 4, 3),
    ({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 3),
    ({"BLOCK_M": 64, "BLOCK_N": 32}, 4, 4),
    ({"BLOCK_M": 32, "BLOCK_N": 32}, 4, 2),
)
backward_q_kernel = _tuned(
    _backward_q,
    ({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 2),
    ({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 2),
    ({"BLOCK_M": 64, "BLOCK_N": 32}, 4, 3),
    ({"BLOCK_M": 32, "BLOCK_N": 32}, 4, 2),
)
backward_kv_kernel = _tuned(
    _backward_kv,
    ({"BLOCK_M": 64, "BLOCK_N": 128}, 8, 2),
    ({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 2),
    ({"BLOCK_M": 32, "BLOCK_N": 128}, 8, 3),
    ({"BLOCK_M": 32, "BLOCK_N": 64}, 4, 3),
    ({"BLOCK_M": 32, "BLOCK_N": 32}, 4, 2),
)
short_forward_kernel = _tuned(
    _short_forward,
    ({"BLOCK_M": 64, "REPEATS": 1}, 4, 2),
    ({"BLOCK_M": 64, "REPEATS": 4}, 4, 2),
    ({"BLOCK_M": 128, "REPEATS": 1}, 8, 2),
    ({"BLOCK_M": 128, "REPEATS": 2}, 8, 2),
    ({"BLOCK_M": 32, "REPEATS": 1}, 4, 2),
)
short_backward_kernel = _tuned(
    _short_backward,
    ({"BLOCK_M": 64}, 8, 2),
    ({"BLOCK_M": 64}, 8, 1),
    ({"BLOCK_M": 32}, 8, 2),
    ({"BLOCK_M": 32}, 4, 1),
)


# --- launching them ------------------------------------------------------------------------------------------------


def _widths(d: int) -> tuple[int, int]:
    """The two parts, powers of two of at least 16, that a head of d channels is cut in; the second may be 0."""
    padded = max(16, triton.next_power_of_2(d))
    first = padded // 2
    rest = max(16, triton.next_power_of_2(max(d - first, 1)))
    return (first, rest) if first >= 16 and first + rest < padded else (padded, 0)


def _shape(n: int, m: int, batch_heads: int) -> int:
    """The kind of shape that block sizes are chosen for: each number's power of two, in one integer."""
    return functools.reduce(lambda code, x: code * 64 + (x - 1).bit_length(), (n, m, batch_heads), 0)


def _precision(dtype: torch.dtype) -> str:
    """float32 products are full float32 products, unless the user allowed TF32 in `torch.backends`."""
    matmul = torch.backends.cuda.matmul
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


@functools.cache
def _device(device: torch.device) -> tuple[str, int]:
    """Name and number of multiprocessors."""
    if device.type != "cuda":
        return "interpreter", 4
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.multi_processor_count


def _rows_dense(*tensors: Tensor) -> list[Tensor]:
    """Copies of those whose rows do not lie dense, or too far apart for the kernels, which find them in 32 bits."""
    dense = [(x.stride(3) == 1 or x.shape[3] == 1) and x.stride(2) * x.shape[2] < 2**31 for x in tensors]
    return [x if keep else x.contiguous() for x, keep in zip(tensors, dense, strict=True)]


def _strides(*tensors: Tensor) -> tuple[int, list[int]]:
    """Strides of batch, head and row of each tensor, in units of 8 elements if they all are multiples of that.

    So the compiler sees that rows begin at multiples of 16 bytes and reads them 16 bytes at a time, which it would not
    of a stride of 40: it looks only for multiples of 16.
    """
    strides = [0 if x.shape[i] == 1 else x.stride(i) for x in tensors for i in range(3)]
    unit = 8 if all(s % 8 == 0 for s in strides) else 1
    return unit, [s // unit for s in strides]


def _like(x: Tensor) -> Tensor:
    """An empty (B, heads, N, d) that lies in memory as (B, N, heads, d)."""
    batch, heads, n, d = x.shape
    return x.new_empty(batch, n, heads, d).transpose(1, 2)


def _common(q: Tensor, k: Tensor, unit: int) -> dict:
    """What every launch passes by name."""
    d = q.shape[3]
    w0, w1 = _widths(d)
    shape = _shape(q.shape[2], k.shape[2], q.shape[0] * q.shape[1])
    return dict(shape=shape, D=d, W0=w0, W1=w1, UNIT=unit, PRECISION=_precision(q.dtype), DEVICE=_device(q.device)[0])


def _run_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = _rows_dense(q, k, v)
    batch, heads, n, d = q.shape
    o, lse = _like(q), q.new_empty(batch, heads, n, dtype=torch.float32)
    unit, strides = _strides(q, k, v)
    forward_kernel[lambda meta: (batch * heads * triton.cdiv(n, meta["BLOCK_M"]),)](
        q, k, v, o, lse, n, k.shape[2], heads, d**-0.5 * math.log2(math.e), *strides, **_common(q, k, unit)
    )  # fmt: skip
    return o, lse


def _run_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, need_q: bool, need_k: bool, need_v: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; an empty tensor for one that is not needed."""
    do, q, k, v = _rows_dense(do, q, k, v)
    # As `_run_forward` laid them out, whatever a hook on saved tensors made of that.
    o, lse = o.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()
    batch, heads, n, d = q.shape
    dq, dk, dv = _gradients(q, k, v, need_q, need_k, need_v)
    m, delta = k.shape[2], torch.empty_like(lse)
    unit, strides = _strides(q, k, v, do)
    common = _common(q, k, unit)
    if need_q or need_k:
        sizes = {name: common[name] for name in ("D", "W0", "W1", "UNIT")}
        blocks = (batch * heads * triton.cdiv(n, 64),)
        _row_products[blocks](o, do, delta, n, heads, *strides[9:], **sizes, BLOCK_M=64)
    scales = d**-0.5 * math.log2(math.e), d**-0.5
    if need_q:
        backward_q_kernel[lambda meta: (batch * heads * triton.cdiv(n, meta["BLOCK_M"]),)](
            q, k, v, do, dq, lse, delta, n, m, heads, *scales, *strides, **common
        )  # fmt: skip
    if need_k or need_v:
        backward_kv_kernel[lambda meta: (batch * heads * triton.cdiv(m, meta["BLOCK_N"]),)](
            q, k, v, do, dk, dv, lse, delta, n, m, heads, *scales, *strides, **common, NEED_K=need_k, NEED_V=need_v
        )  # fmt: skip
    return dq, dk, dv


def _run_short_forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = _rows_dense(q, k, v)
    batch, heads, n, d = q.shape
    m, o = k.shape[2], _like(q)
    unit, strides = _strides(q, k, v)
    short_forward_kernel[lambda meta: (batch * heads * triton.cdiv(n, meta["BLOCK_M"] * meta["REPEATS"]),)](
        q, k, v, o, n, m, heads, d**-0.5 * math.log2(math.e), *strides,
        **_common(q, k, unit), BLOCK_N=max(16, triton.next_power_of_2(m)),
    )  # fmt: skip
    return o


def _run_short_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, need_q: bool, need_k: bool, need_v: bool
) -> tuple[Tensor, Tensor, Tensor]:
    do, q, k, v = _rows_dense(do, q, k, v)
    batch, heads, n, d = q.shape
    dq, dk, dv = _gradients(q, k, v, need_q, need_k, need_v)
    # Queries are shared out so that about two programs fall to each multiprocessor; if only dq is wanted, there is
    # nothing to add up, and each program may as well have one block.
    wanted = 2 * _device(q.device)[1] // (batch * heads) if need_k or need_v else n
    part_rows = 128 * triton.cdiv(triton.cdiv(n, max(1, wanted)), 128)
    parts = triton.cdiv(n, part_rows)
    m = k.shape[2]
    partial = k.new_empty(parts, 2, batch, m, heads, d, dtype=torch.float32) if need_k or need_v else dk
    unit, strides = _strides(q, k, v, do)
    short_backward_kernel[(batch * heads * parts,)](
        q, k, v, do, dq, partial, n, m, heads, d**-0.5 * math.log2(math.e), d**-0.5,
        part_rows, parts, batch * m * heads * d, *strides, **_common(q, k, unit),
        NEED_Q=need_q, NEED_K=need_k, NEED_V=need_v, BLOCK_N=max(16, triton.next_power_of_2(m)),
    )  # fmt: skip
    if need_k:
        dk.copy_(partial[:, 0].sum(0).transpose(1, 2))
    if need_v:
        dv.copy_(partial[:, 1].sum(0).transpose(1, 2))
    return dq, dk, dv


def _gradients(q: Tensor, k: Tensor, v: Tensor, *needed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients that are needed, empty tensors for the others."""
    return tuple(_like(x) if need else x.new_empty(0) for x, need in zip((q, k, v), needed, strict=True))


# --- as PyTorch operators ------------------------------------------------------------------------------------------
# Registered by hand rather than with torch.library.custom_op, whose wrapping costs 50 µs a call where this costs 15
# (measured on one core of an AMD EPYC, without a launch): single-image tuning is bound by just such costs.

_QKV, _NEEDS = "Tensor q, Tensor k, Tensor v", "bool need_q, bool need_k, bool need_v"
_GRADIENTS = "(Tensor, Tensor, Tensor)"
library = torch.library.Library("palimpsest", "DEF")
library.define(f"attention({_QKV}) -> (Tensor, Tensor)")
library.define(f"short_attention({_QKV}) -> Tensor")
library.define(f"attention_backward(Tensor do, {_QKV}, Tensor o, Tensor lse, {_NEEDS}) -> {_GRADIENTS}")
library.define(f"short_attention_backward(Tensor do, {_QKV}, {_NEEDS}) -> {_GRADIENTS}")
ops = torch.ops.palimpsest


def _backward(op, ctx, do: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # create_graph=True, whose second derivatives would lack this part
        raise RuntimeError("fused attention can be differentiated only once; use attention=reference")
    need = ctx.needs_input_grad
    return tuple(g if n else None for g, n in zip(op(do, *ctx.saved_tensors, *need), need, strict=True))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            o, lse = ops.attention.default(q, k, v)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    def backward(ctx, do: Tensor, _):
        return _backward(ops.attention_backward.default, ctx, do)


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        with torch._C._AutoDispatchBelowAutograd():
            return ops.short_attention.default(q, k, v)

    @staticmethod
    def backward(ctx, do: Tensor):
        return _backward(ops.short_attention_backward.default, ctx, do)


def _on_its_device(run):
    """Triton launches on the current device, which need not be the one of the tensors."""

    @functools.wraps(run)
    def guarded(first: Tensor, *others):
        with torch.cuda.device_of(first):
            return run(first, *others)

    return guarded


def _register(name: str, run, autograd=None) -> None:
    for key in ("CUDA", "CPU"):
        library.impl(name, _on_its_device(run), key)
    if autograd:
        library.impl(name, autograd.apply, "Autograd")


_register("attention", _run_forward, _Attention)
_register("short_attention", _run_short_forward, _ShortAttention)
_register("attention_backward", _run_backward)
_register("short_attention_backward", _run_short_backward)


@torch.library.register_fake("palimpsest::attention", lib=library)
def _(q, k, v):
    return _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("palimpsest::short_attention", lib=library)
def _(q, k, v):
    return _like(q)


@torch.library.register_fake("palimpsest::attention_backward", lib=library)
def _(do, q, k, v, o, lse, *needed):
    return _gradients(q, k, v, *needed)


@torch.library.register_fake("palimpsest::short_attention_backward", lib=library)
def _(do, q, k, v, *needed):
    return _gradients(q, k, v, *needed)


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v by the kernels above, deterministic, differentiable once.

    q (B, heads, N, d), k and v (B, heads, M, d), all of one type of float16, bfloat16 and float32, d up to
    `WIDEST`, N and M from 1 -> (B, heads, N, d). Under autocast they are cast first, as PyTorch's own attention does.
    Raises InputError for another type, ValueError for shapes that do not fit together. Whether the device can run it is
    for the caller to know: see `attention`.
    """
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise InputError(f"fused attention takes float16, bfloat16 or float32, not {q.dtype}; use attention=sdpa")
    batch, heads, n, d = q.shape
    m = k.shape[2]
    if k.shape != (batch, heads, m, d) or v.shape != k.shape or not 1 <= d <= WIDEST or 0 in (n, m, batch, heads):
        raise ValueError(f"fused attention cannot take q {[*q.shape]}, k {[*k.shape]}, v {[*v.shape]}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"fused attention needs one type, not {q.dtype}, {k.dtype}, {v.dtype}")
    short = m <= (SHORT if d <= 96 else SHORT // 2) and (q.dtype != torch.float32 or INTERPRETED.value)
    if short:  # `SHORT` says why
        return ops.short_attention.default(q, k, v)
    return ops.attention.default(q, k, v)[0]
