"""Time attention at Stable Diffusion's shapes: this project's kernels beside each of PyTorch's backends.

    python -m benchmarks.attention            # into benchmarks/results/attention-MACHINE.{json,md}

Every attention of Stable Diffusion 1.5 at 512x512 and the largest of 2.1 at 768x768, self and cross (77 tokens), batch
2 (guidance's), forward and forward with backward. q, k and v are views of fused projections, as in the UNet. Each
result is first held against float64 in two heads; one that is wrong is not timed.

`us` is the device's time: the median by `triton.testing.do_bench`, which flushes the L2 cache and launches ahead.
`eager_us` is the time of a call from Python, calls back to back: launching bounds it at small shapes.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer

from benchmarks.writing import keep, machine, table
from models.attention import attention, why_not_fused

BATCH, TOKENS = 2, 77
LEVELS = [(64, 8, 40), (32, 8, 80), (16, 8, 160), (8, 8, 160), (96, 5, 64)]  # pixels on a side, heads, width of a head
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
BACKENDS = ["fused", "default", *SDPA]  # default: PyTorch's own choice
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # ‖result - exact‖ / ‖exact‖


def inputs(n: int, m: int, heads: int, d: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v as they leave the projections, and the gradient of the output, as the next one gives it."""

    def projection(length: int, parts: int) -> Tensor:
        x = torch.randn(BATCH, length, parts * heads * d, device=device).to(dtype)
        return rearrange(x, "b n (parts h d) -> parts b h n d", parts=parts, h=heads)

    q, k, v = projection(n, 3) if n == m else (*projection(n, 1), *projection(m, 2))
    return [*(x.requires_grad_() for x in (q, k, v)), projection(n, 1)[0]]


def call(backend: str, backward: bool, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> tuple[Tensor, ...]:
    with torch.set_grad_enabled(backward):
        if backend in SDPA:
            with sdpa_kernel(SDPA[backend]):
                o = F.scaled_dot_product_attention(q, k, v)
        else:
            o = attention(q, k, v, "fused" if backend == "fused" else "sdpa")
        return o, *(torch.autograd.grad(o, (q, k, v), do) if backward else ())


def error(found: tuple[Tensor, ...], q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> float:
    """The largest relative error against float64 in the first and the last head."""
    worst = 0.0
    for b, h in ((0, 0), (-1, -1)):
        leaves = [x.detach()[b, h].double().requires_grad_() for x in (q, k, v)]
        o = (leaves[0] @ leaves[1].mT * q.shape[-1] ** -0.5).softmax(-1) @ leaves[2]
        expected = o, *torch.autograd.grad(o, leaves, do[b, h].double())
        for x, e in zip(found, expected, strict=False):
            distance = float((x[b, h].double() - e).norm() / e.norm())
            worst = max(worst, distance if distance == distance else float("inf"))
    return worst


def microseconds(work: Callable, device: torch.device) -> tuple[float, float]:
    """The median time on the device, and the time of a call from Python."""
    if device.type != "cuda":
        median = 1e6 * Timer("work()", globals={"work": work}).blocked_autorange(min_run_time=0.2).median
        return median, median
    from triton.testing import do_bench

    median = 1e3 * do_bench(work, quantiles=[0.5])
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        work()
    torch.cuda.synchronize()
    return median, 1e6 * (time.perf_counter() - start) / 20


def measure(backend: str, name: str, tensors: list[Tensor]) -> dict:
    """The columns of one row: times and error, or why there are none."""
    work = partial(call, backend, name != "forward", *tensors)
    if backend == "fused" and (why := why_not_fused(tensors[0].device)):
        return {"skipped": why}
    try:
        distance = error(work(), *tensors)
    except RuntimeError as reason:
        return {"skipped": str(reason).splitlines()[0]}
    if distance > TOLERANCE[tensors[0].dtype]:
        return {"wrong": distance}
    us, eager = microseconds(work, tensors[0].device)
    return {"us": us, "eager_us": eager, "error": distance}


def report(rows: list[dict]) -> str:
    lines = []
    for key in dict.fromkeys((r["shape"], r["pass"]) for r in rows):
        here = {r["backend"]: r for r in rows if (r["shape"], r["pass"]) == key}
        cells = (f"{r['us']:.1f} ({r['eager_us']:.1f})" if "us" in (r := here[b]) else "-" for b in BACKENDS)
        lines.append((*key, *cells))
    text = "Median µs on the device (µs a call from Python). Shapes: queries x keys x width, heads.\n\n"
    text += table(["shape", "pass", *BACKENDS], lines)
    reasons = {f"{r['backend']}: {r['skipped']}" for r in rows if "skipped" in r}
    return text + "".join(f"\nNot timed, {reason}\n" for reason in sorted(reasons))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time attention at Stable Diffusion's shapes.")
    parser.add_argument("--dtype", default=None, choices=["float32", "float16", "bfloat16"], help="bfloat16 on CUDA")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    torch.manual_seed(0)
    about = f"{machine(device)}, torch {torch.__version__}"
    rows = []
    for side, heads, d in LEVELS:
        n = side**2
        for m in (n, TOKENS):
            tensors = inputs(n, m, heads, d, device, dtype)
            for name in ("forward", "forward and backward"):
                for backend in BACKENDS:
                    row = {"shape": f"{n}x{m}x{d}, {heads}", "pass": name, "backend": backend}
                    rows.append(row | measure(backend, name, tensors))
                    print(rows[-1], file=sys.stderr, flush=True)
            text = f"# Attention, {dtype}: {about}\n\n{report(rows)}"  # now, so that an interrupted run leaves its rows
            keep(f"attention-{machine(device).split(' (')[0]}", text, {"machine": about, "rows": rows})
    print(report(rows))
    if any("wrong" in row for row in rows):
        sys.exit("some results were wrong: see above")


if __name__ == "__main__":
    main()
