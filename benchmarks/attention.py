"""Attention timed at Stable Diffusion's shapes: this project's kernels, each of PyTorch's backends, plain products.

    python benchmarks/attention.py                                  # into benchmarks/results/attention-DEVICE.{json,md}
    python benchmarks/attention.py --dtypes bfloat16 float16 float32 --deterministic
    python benchmarks/attention.py --quick                          # small shapes, few repeats: does it run?

Every attention of Stable Diffusion 1.5 at 512x512 and 2.1 at 768x768, self and cross (77 tokens), batch 2 (guidance's),
forward and forward with backward. q, k and v are views of fused projections, as in the UNet. Each result is first held
against float64 (two heads of it), and not timed if it is wrong.

On CUDA each time is one replay of a CUDA graph, after the L2 cache was flushed, by events: what the GPU takes. `eager`
is what a call takes where launching from Python is the bound, as it is at small sizes outside a graph. Fractions are
of the measured ceilings: the time that the products would take at the rate of a large matrix product, and the time
that q, k, v, o and their gradients, each moved once, would take at the rate of a large copy, over the time taken.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.writing import keep, machine
from models.attention import attention, why_not_fused

BATCH, TOKENS = 2, 77
LEVELS = {  # pixels on a side, heads, width of a head
    "1.5 at 512": [(64, 8, 40), (32, 8, 80), (16, 8, 160), (8, 8, 160)],
    "2.1 at 768": [(96, 5, 64), (48, 10, 64), (24, 20, 64), (12, 20, 64)],
}
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
BACKENDS = ["fused", *SDPA, "reference"]
# ‖result - exact‖ / ‖exact‖: a few units in the last place of the type; float32 with room for long sums
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def shapes(quick: bool) -> list[dict]:
    found = []
    for model, levels in LEVELS.items():
        for side, heads, d in levels:
            n = side**2 // (16 if quick else 1)
            for kind, m in (("self", n), ("cross", TOKENS)):
                found.append({"model": model, "kind": kind, "n": n, "m": m, "heads": heads, "d": d})
    return found


def inputs(shape: dict, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v as they leave the projections, and the gradient of the output, as it comes from the next one."""
    n, m, heads, d = (shape[name] for name in ("n", "m", "heads", "d"))

    def projection(length: int, parts: int) -> Tensor:
        x = torch.randn(BATCH, length, parts * heads * d, device=device).to(dtype)
        return rearrange(x, "b n (parts h d) -> parts b h n d", parts=parts, h=heads)

    q, k, v = projection(n, 3) if shape["kind"] == "self" else (*projection(n, 1), *projection(m, 2))
    return [*(x.requires_grad_() for x in (q, k, v)), projection(n, 1)[0]]


def forward(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if backend in SDPA:
        with sdpa_kernel(SDPA[backend]):
            return F.scaled_dot_product_attention(q, k, v)
    return attention(q, k, v, backend)


def results(backend: str, q: Tensor, k: Tensor, v: Tensor, do: Tensor, backward: bool) -> tuple[Tensor, ...]:
    with torch.set_grad_enabled(backward):
        o = forward(backend, q, k, v)
        return o, *(torch.autograd.grad(o, (q, k, v), do) if backward else ())


def error(found: tuple[Tensor, ...], q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> float:
    """The largest relative error of output and, if found, gradients, against float64 in the first and the last head."""
    worst = 0.0
    for b, h in ((0, 0), (-1, -1)):
        leaves = [x.detach()[b, h].double().requires_grad_() for x in (q, k, v)]
        o = (leaves[0] @ leaves[1].mT * q.shape[-1] ** -0.5).softmax(-1) @ leaves[2]
        expected = o, *torch.autograd.grad(o, leaves, do[b, h].double())
        for x, e in zip(found, expected, strict=False):
            distance = ((x[b, h].double() - e).norm() / e.norm()).item()
            worst = max(worst, distance if distance == distance else float("inf"))
    return worst


class Clock:
    """Times on one device, in microseconds."""

    def __init__(self, device: torch.device, repeats: int):
        self.cuda = device.type == "cuda"
        self.repeats = repeats
        if self.cuda:
            size = torch.cuda.get_device_properties(device).L2_cache_size
            self.flush = torch.empty(4 * size, dtype=torch.uint8, device=device)

    def captured(self, call: Callable) -> Callable:
        """On CUDA a replay of `call`'s kernels, without what launching them costs; elsewhere the call itself."""
        if not self.cuda:
            return call
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):  # the first chooses block sizes, and loads libraries
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def spread(self, call: Callable) -> list[float]:
        """Median, and the quarters below and above."""
        call()
        taken = []
        for _ in range(self.repeats):
            if self.cuda:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self.flush.zero_()
                start.record()
                call()
                end.record()
                end.synchronize()
                taken.append(1e3 * start.elapsed_time(end))
            else:
                before = time.perf_counter()
                call()
                taken.append(1e6 * (time.perf_counter() - before))
        low, median, high = statistics.quantiles(taken, n=4) if len(taken) > 1 else taken * 3
        return [median, low, high]

    def eager(self, call: Callable, calls: int = 20) -> float:
        """Microseconds a call from Python, calls back to back."""
        torch.cuda.synchronize()
        before = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        return 1e6 * (time.perf_counter() - before) / calls


def ceilings(clock: Clock, device: torch.device, dtype: torch.dtype, quick: bool) -> tuple[float, float]:
    """What a large matrix product reaches, in operations a second, and a large copy, in bytes read and written."""
    n = 512 if quick else 8192 if clock.cuda else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = 2 * n**3 / (1e-6 * clock.spread(lambda: a @ b)[0])
    source = torch.randn(2**31 // 4 if clock.cuda else 2**28 // 4, device=device)
    target = torch.empty_like(source)
    return product, 2 * 4 * source.numel() / (1e-6 * clock.spread(lambda: target.copy_(source))[0])


def floors(shape: dict, dtype: torch.dtype, backward: bool) -> tuple[float, float]:
    """Operations that the matrix products must do (2 forward, 5 backward), and bytes that must move."""
    n, m, heads, d = (shape[name] for name in ("n", "m", "heads", "d"))
    operations = 2 * BATCH * heads * n * m * d * (7 if backward else 2)
    rows = (
        2 * n + 2 * m + (3 * n + 4 * m if backward else 0)
    )  # q k v -> o, and q k v do -> dq dk dv: q, do, dq; k, v ...
    return operations, BATCH * heads * rows * d * dtype.itemsize


def measure(clock: Clock, backend: str, shape: dict, tensors: list[Tensor], peaks: tuple[float, float]) -> list[dict]:
    """A row for either pass: times, or why there are none."""
    dtype, cuda = tensors[0].dtype, clock.cuda
    row = {**shape, "dtype": str(dtype).removeprefix("torch."), "backend": backend}
    weights = BATCH * shape["heads"] * shape["n"] * shape["m"] * 4
    if backend == "fused" and (why := why_not_fused(tensors[0].device)):
        return [{**row, "skipped": why}]
    if not cuda and backend in ("math", "reference") and weights > 2**29:
        return [{**row, "skipped": f"{weights / 2**30:.1f} GB of weights, several times over"}]
    rows = []
    for name in ("forward", "forward and backward"):
        backward = name != "forward"
        call = partial(results, backend, *tensors, backward)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # why a backend does not serve, at length
                distance = error(call(), *tensors)
        except RuntimeError as reason:
            rows.append({**row, "pass": name, "skipped": str(reason).splitlines()[0]})
            continue
        if distance > TOLERANCE[dtype]:
            rows.append({**row, "pass": name, "wrong": distance})
            continue
        median, low, high = clock.spread(clock.captured(call))
        operations, moved = floors(shape, dtype, backward)
        rows.append(
            {
                **row,
                "pass": name,
                "us": median,
                "quarters": [low, high],
                "eager_us": clock.eager(call) if cuda else median,
                "error": distance,
                "of_product": operations / peaks[0] / (1e-6 * median),
                "of_copy": moved / peaks[1] / (1e-6 * median),
            }
        )
    return rows


def tables(rows: list[dict]) -> str:
    """Medians as Markdown, one table for each dtype and pass, a column for each backend."""
    text = []
    timed = [r for r in rows if "us" in r]
    for dtype, name in dict.fromkeys((r["dtype"], r["pass"]) for r in timed):
        here = [r for r in timed if (r["dtype"], r["pass"]) == (dtype, name)]
        backends = [b for b in BACKENDS if any(r["backend"] == b for r in here)]
        text += [
            f"## {name}, {dtype}",
            "",
            "Median µs (quarters); fraction of the product's and the copy's ceiling.",
            "",
        ]
        text.append("| shape | " + " | ".join(backends) + " | best of PyTorch's / fused |")
        text.append("|" + "---|" * (len(backends) + 2))
        for shape in dict.fromkeys((r["model"], r["kind"], r["n"], r["m"], r["heads"], r["d"]) for r in here):
            model, kind, n, m, heads, d = shape
            found = {r["backend"]: r for r in here if (r["model"], r["kind"], r["n"], r["m"]) == shape[:4]}
            cells = [f"{model}, {kind}, {heads} heads, {n}x{m}x{d}"]
            for backend in backends:
                r = found.get(backend)
                cells.append(
                    f"{r['us']:.1f} ({r['quarters'][0]:.1f}-{r['quarters'][1]:.1f}); "
                    f"{r['of_product']:.2f}, {r['of_copy']:.2f}"
                    if r
                    else "-"
                )
            theirs = [found[b]["us"] for b in SDPA if b in found]
            ratio = f"{min(theirs) / found['fused']['us']:.2f}" if theirs and "fused" in found else "-"
            text.append("| " + " | ".join([*cells, ratio]) + " |")
        text.append("")
    skipped = [r for r in rows if "skipped" in r]
    why = dict.fromkeys(
        ", ".join([r["backend"], r["dtype"], r.get("pass", "both")]) + f": {r['skipped']}" for r in skipped
    )
    text += [f"- not timed: {reason}" for reason in why]
    text += [f"- WRONG: {r}" for r in rows if "wrong" in r]
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time attention at Stable Diffusion's shapes.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "float16", "bfloat16"], help="on CPUs float32")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--repeats", type=int, help="100 on CUDA, else 3")
    parser.add_argument(
        "--deterministic", action="store_true", help="only algorithms that repeat their bits, as edit.py"
    )
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the queries; writes no results")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.index is not None:
        torch.cuda.set_device(device)
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(options.deterministic)
    torch.manual_seed(0)
    clock = Clock(device, options.repeats or (100 if device.type == "cuda" else 3))
    rows, peaks = [], {}
    for name in options.dtypes or (["bfloat16"] if clock.cuda else ["float32"]):
        dtype = getattr(torch, name)
        peaks[name] = ceilings(clock, device, dtype, options.quick)
        for shape in shapes(options.quick):
            tensors = inputs(shape, device, dtype)
            for backend in options.backends:
                new = measure(clock, backend, shape, tensors, peaks[name])
                rows += new
                print(*(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in new[-1].items()), flush=True)
    try:
        import triton
    except ModuleNotFoundError:
        triton = None
    about = {
        "machine": machine(device),
        "torch": torch.__version__,
        "triton": triton and triton.__version__,
        "deterministic": options.deterministic,
        "batch": BATCH,
        "timed": f"median of {clock.repeats}" + (", CUDA graph replays, L2 flushed before each" if clock.cuda else ""),
        "ceilings": {d: {"product TFLOP/s": p / 1e12, "copy GB/s": c / 1e9} for d, (p, c) in peaks.items()},
    }
    text = "# Attention\n\n" + "".join(f"- {k}: {v}\n" for k, v in about.items()) + "\n" + tables(rows)
    print(text)
    if not options.quick:
        stem = f"attention-{machine(device).split(' (')[0]}" + ("-deterministic" if options.deterministic else "")
        keep(stem, text, {**about, "rows": rows})
    if any("wrong" in r for r in rows):
        sys.exit("some results were wrong: see above")


if __name__ == "__main__":
    main()
