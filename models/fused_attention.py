"""Attention without the N x M matrix in memory, forward and backward; three kernels in Triton.

FlashAttention-2 (Dao, 2023, arXiv 2307.08691): an online softmax over blocks of keys. The forward pass keeps the
log-sum-exp of each row; the backward pass makes the weights again from it.

- Products accumulate in float32. Logits are in base 2, because the hardware's exponential is.
- Nothing is added atomically: equal inputs give equal bits.
- q, k and v are read where they lie, such as in one fused projection; the output lies as (B, N, heads, d), so that
  joining the heads is a view.
- A head is padded on the chip to a power of two, since Triton's blocks have no other size.
- The grid of every kernel is (blocks of rows, heads, batch)."""

import functools
import math
import os

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.attention import WIDEST

# Triton's interpreter, for tests on the CPU. It cannot multiply bfloat16 matrices, so `_dot` widens them first.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """a b, plus acc if that is not None; float32. a is rounded to b's type."""
    a = a.to(b.dtype)
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _head(base, stride_b, stride_h, UNIT: tl.constexpr):
    """Where this program's head of its batch row begins. Strides count UNIT elements; `_plan` says why."""
    return base + (tl.program_id(2).to(tl.int64) * stride_b + tl.program_id(1).to(tl.int64) * stride_h) * UNIT


@triton.jit
def _load(base, rows, stride, length, D: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    """Some rows of a matrix of D columns, padded to WIDTH with zeros. WHOLE: none of them is past `length`."""
    columns = tl.arange(0, WIDTH)
    present = columns[None, :] < D
    if not WHOLE:
        present = present & (rows[:, None] < length)
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=present, other=0.0)


@triton.jit
def _store(base, rows, stride, length, x, D: tl.constexpr, WIDTH: tl.constexpr):
    columns = tl.arange(0, WIDTH)
    present = (rows[:, None] < length) & (columns[None, :] < D)
    tl.store(base + rows[:, None] * stride + columns[None, :], x.to(base.dtype.element_ty), mask=present)


@triton.jit
def _forward_kernel(
    q, k, v, o, lse, N, M, scale, sqb, sqh, sqn, skb, skh, skn, svb, svh, svn,
    D: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head against all keys, in blocks of BLOCK_N (FlashAttention-2, alg. 1)."""
    heads = tl.num_programs(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = _head(k, skb, skh, UNIT)
    v = _head(v, svb, svh, UNIT)
    q_block = _load(_head(q, sqb, sqh, UNIT), rows, sqn * UNIT, N, D, WIDTH, False)
    acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, M, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k_block = _load(k, keys, skn * UNIT, M, D, WIDTH, WHOLE)
        s = _dot(q_block, tl.trans(k_block), None, PRECISION) * (scale * LOG2_E)
        if not WHOLE:
            s = tl.where(keys[None, :] < M, s, -float("inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        # While every logit of a row was -inf there is nothing to subtract: -inf - -inf would make NaN of later keys.
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        p = tl.exp2(s - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(p, 1)
        v_block = _load(v, keys, svn * UNIT, M, D, WIDTH, WHOLE)
        acc = _dot(p, v_block, acc * shrink[:, None], PRECISION)
        top = new_top
    _store(_head(o, N * heads, 1, D), rows, heads * D, N, acc / total[:, None], D, WIDTH)
    tl.store(_head(lse, N * heads, N, 1) + rows, top + tl.log2(total), mask=rows < N)


@triton.jit
def _backward_q_kernel(
    q, k, v, o, do, lse, delta, dq, N, M, scale, sqb, sqh, sqn, skb, skh, skn, svb, svh, svn,
    D: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head; their dq, and delta = rowsum(o * do) for the next kernel."""
    heads = tl.num_programs(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    do_block = _load(_head(do, N * heads, 1, D), rows, heads * D, N, D, WIDTH, False)
    o_block = _load(_head(o, N * heads, 1, D), rows, heads * D, N, D, WIDTH, False)
    row_delta = tl.sum(o_block.to(tl.float32) * do_block.to(tl.float32), 1)
    tl.store(_head(delta, N * heads, N, 1) + rows, row_delta, mask=rows < N)
    k = _head(k, skb, skh, UNIT)
    v = _head(v, svb, svh, UNIT)
    q_block = _load(_head(q, sqb, sqh, UNIT), rows, sqn * UNIT, N, D, WIDTH, False)
    row_lse = tl.load(_head(lse, N * heads, N, 1) + rows, mask=rows < N, other=0.0)
    acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    for start in range(0, M, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k_block = _load(k, keys, skn * UNIT, M, D, WIDTH, WHOLE)
        v_block = _load(v, keys, svn * UNIT, M, D, WIDTH, WHOLE)
        p = tl.exp2(_dot(q_block, tl.trans(k_block), None, PRECISION) * (scale * LOG2_E) - row_lse[:, None])
        if not WHOLE:  # a key that is not there has the logit 0, of which the exponential may well be infinite
            p = tl.where(keys[None, :] < M, p, 0.0)
        ds = p * (_dot(do_block, tl.trans(v_block), None, PRECISION) - row_delta[:, None])
        acc = _dot(ds, k_block, acc, PRECISION)
    _store(_head(dq, N * heads, 1, D), rows, heads * D, N, acc * scale, D, WIDTH)


@triton.jit
def _backward_kv_kernel(
    q, k, v, do, lse, delta, dk, dv, N, M, scale, sqb, sqh, sqn, skb, skh, skn, svb, svh, svn,
    D: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One program: dk and dv of BLOCK_N keys of one head, over all queries. Weights are held transposed, keys first."""
    heads = tl.num_programs(1)
    keys = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    q = _head(q, sqb, sqh, UNIT)
    do = _head(do, N * heads, 1, D)
    lse = _head(lse, N * heads, N, 1)
    delta = _head(delta, N * heads, N, 1)
    k_block = _load(_head(k, skb, skh, UNIT), keys, skn * UNIT, M, D, WIDTH, False)
    v_block = _load(_head(v, svb, svh, UNIT), keys, svn * UNIT, M, D, WIDTH, False)
    k_acc = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    v_acc = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    for start in range(0, N, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q_block = _load(q, rows, sqn * UNIT, N, D, WIDTH, WHOLE)
        do_block = _load(do, rows, heads * D, N, D, WIDTH, WHOLE)
        row_lse = tl.load(lse + rows, mask=rows < N, other=0.0)
        p = tl.exp2(_dot(k_block, tl.trans(q_block), None, PRECISION) * (scale * LOG2_E) - row_lse[None, :])
        if not WHOLE:  # a query that is not there must not count, not even where a key is infinite
            p = tl.where(rows[None, :] < N, p, 0.0)
        v_acc = _dot(p, do_block, v_acc, PRECISION)
        row_delta = tl.load(delta + rows, mask=rows < N, other=0.0)
        ds = p * (_dot(v_block, tl.trans(do_block), None, PRECISION) - row_delta[None, :])
        k_acc = _dot(ds, q_block, k_acc, PRECISION)
    _store(_head(dk, M * heads, 1, D), keys, heads * D, M, k_acc * scale, D, WIDTH)
    _store(_head(dv, M * heads, 1, D), keys, heads * D, M, v_acc, D, WIDTH)


@functools.cache
def _blocks(width: int, dtype: torch.dtype, precision: str, held: int, device: torch.device) -> tuple[int, ...]:
    """Rows that a program holds, rows of each block that it streams, warps, stages: the first choice that fits.

    A program holds `held` matrices of `width` channels (forward q; backward two) and streams two."""
    shared = 99 * 1024  # bytes, of the smaller GPUs of compute capability 8.0 or more
    if device.type == "cuda":
        if dtype == torch.float32 and precision == "ieee":  # without tensor cores, unrolled: large blocks spill
            return (32, 32, 8, 1) if width <= 64 else (16, 16, 4, 1)
        shared = triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]
    choices = (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 4, 1)
    for rows, streamed, warps, stages in choices:
        if (held * rows + 2 * stages * streamed) * width * dtype.itemsize < shared:
            return rows, streamed, warps, stages
    return 16, 16, 4, 1


def _precision(dtype: torch.dtype) -> str:
    """float32 products are full float32 products, unless the user allowed TF32 in `torch.backends`."""
    matmul = torch.backends.cuda.matmul
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


def _plan(q: Tensor, k: Tensor, v: Tensor, held: int) -> tuple[tuple, int, int, dict[str, int]]:
    """What all kernels take, from N to PRECISION; and `_blocks`'s rows held, rows streamed, and options of Triton.

    Strides of batch, head and row count a unit. With a unit of 8 the compiler sees that rows begin at multiples of 16
    bytes and reads 16 bytes at a time. Without, it would not of a stride of 40: it looks only for multiples of 16."""
    (n, d), m, precision = q.shape[2:], k.shape[2], _precision(q.dtype)
    strides, width = [s for x in (q, k, v) for s in x.stride()[:3]], max(16, triton.next_power_of_2(d))
    unit = math.gcd(8, *strides)
    rows, streamed, warps, stages = _blocks(width, q.dtype, precision, held, q.device)
    shared = n, m, d**-0.5, *(s // unit for s in strides), d, width, unit, precision
    return shared, rows, streamed, {"num_warps": warps, "num_stages": stages}


def _empty(x: Tensor) -> Tensor:
    """An empty (B, heads, N, d) like x that lies in memory as (B, N, heads, d)."""
    batch, heads, n, d = x.shape
    return x.new_empty(batch, n, heads, d).transpose(1, 2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
        (batch, heads, n, _), m = q.shape, k.shape[2]
        o, lse = _empty(q), q.new_empty(batch, heads, n, dtype=torch.float32)  # lse in base 2
        shared, rows, streamed, options = _plan(q, k, v, 1)
        with torch.cuda.device_of(q):  # Triton launches on the current device, which need not be that of the tensors
            _forward_kernel[(triton.cdiv(n, rows), heads, batch)](
                q, k, v, o, lse, *shared, rows, streamed, m % streamed == 0, **options
            )
        ctx.save_for_backward(q, k, v, o, lse)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, o, lse = ctx.saved_tensors
        do, o = do.transpose(1, 2).contiguous(), o.transpose(1, 2)
        (batch, heads, n, _), m = q.shape, k.shape[2]
        dq, dk, dv, delta = _empty(q), _empty(k), _empty(v), torch.empty_like(lse)
        shared, rows, streamed, options = _plan(q, k, v, 2)
        with torch.cuda.device_of(q):
            _backward_q_kernel[(triton.cdiv(n, rows), heads, batch)](
                q, k, v, o, do, lse, delta, dq, *shared, rows, streamed, m % streamed == 0, **options
            )
            _backward_kv_kernel[(triton.cdiv(m, rows), heads, batch)](
                q, k, v, do, lse, delta, dk, dv, *shared, streamed, rows, n % streamed == 0, **options
            )
        return dq, dk, dv


@torch.compiler.disable
def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v by the kernels above, deterministic, differentiable once; compiled graphs break around it.

    q (B, heads, N, d), k and v (B, heads, M, d), all of one type of float16, bfloat16 and float32, d up to
    `WIDEST`, N and M from 1 -> (B, heads, N, d), on a device that can. Raises ValueError for other types or shapes."""
    (batch, heads, _, d), types = q.shape, {q.dtype, k.dtype, v.dtype}
    fit = k.shape == v.shape == (batch, heads, k.shape[2], d) and d <= WIDEST and len(types) == 1
    if not fit or not types <= {torch.float16, torch.bfloat16, torch.float32}:
        given = ", ".join(f"{[*x.shape]} {x.dtype}" for x in (q, k, v))
        raise ValueError(f"fused attention cannot take q, k and v of {given}; attention=sdpa can")
    return _Attention.apply(q, k, v)
