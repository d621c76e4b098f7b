"""Time attention at Stable Diffusion's shapes: this project's kernels beside each of PyTorch's backends.

    python -m benchmarks.attention            # into benchmarks/results/attention-MACHINE.{json,md}

Every attention of Stable Diffusion 1.5 at 512x512 and the largest of 2.1 at 768x768, self and cross (77 tokens), batch
2 (guidance's), forward and with backward, in bfloat16 on CUDA, else float32. q, k and v are views of fused projections,
as in the UNet. Each result is first held against float64 in one head; one that is wrong is not timed.

Triton's `perf_report` walks the shapes and adds a plot and a CSV of each kind. Times are the device's, by its
`do_bench`, which flushes the L2 cache and launches ahead: at small shapes a call from Python takes longer.
"""

import math
import sys
from contextlib import nullcontext
from functools import partial
from itertools import product

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer

from benchmarks.writing import CUDA, DEVICE, DTYPE, RESULTS, SMALL, Results
from errors import InputError
from models.attention import attention

BATCH, TOKENS = 2, 77
SHAPES = [(64, 8, 160), (256, 8, 160), (1024, 8, 80), (4096, 8, 40), (9216, 5, 64)]  # queries, heads, width of a head
SDPA = {name: getattr(SDPBackend, f"{name.upper()}_ATTENTION") for name in ("flash", "efficient", "cudnn")}
BACKENDS = ["fused", "default", *SDPA]  # default: PyTorch's own choice
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[DTYPE]  # ‖result - exact‖ / ‖exact‖


def inputs(n: int, m: int, heads: int, d: int) -> list[Tensor]:
    """q, k, v as they leave the fused projections, and the gradient of the output, as the next one gives it."""
    fused = [(n, 3), (n, 1)] if n == m else [(n, 1), (m, 2), (n, 1)]  # length, and the parts of one product
    products = (torch.randn(BATCH, length, parts, heads, d, device=DEVICE).to(DTYPE) for length, parts in fused)
    *qkv, do = (part for product in products for part in rearrange(product, "b n parts h d -> parts b h n d"))
    return [*(x.requires_grad_() for x in qkv), do]


def call(backend: str, backward: bool, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> tuple[Tensor, ...]:
    with torch.set_grad_enabled(backward), sdpa_kernel(SDPA[backend]) if backend in SDPA else nullcontext():
        o = attention(q, k, v, "fused" if backend == "fused" else "sdpa")
        return o, *(torch.autograd.grad(o, (q, k, v), do) if backward else ())


def error(found: tuple[Tensor, ...], q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> float:
    """The largest relative error against float64 in the last head."""
    leaves = [x.detach()[-1, -1].double().requires_grad_() for x in (q, k, v)]
    o = (leaves[0] @ leaves[1].mT * q.shape[-1] ** -0.5).softmax(-1) @ leaves[2]
    expected = o, *torch.autograd.grad(o, leaves, do[-1, -1].double())
    distances = [(x[-1, -1] - e).norm() / e.norm() for x, e in zip(found, expected, strict=False)]
    return torch.stack(distances).detach().nan_to_num(torch.inf).max().item()


def measure(results: Results, queries: int, heads: int, width: int, backend: str, keys: str, work: str) -> float:
    """The median time on the device in µs, NaN where the backend cannot do it or is wrong; `results` has it at once."""
    m = queries if keys == "self" else TOKENS
    tensors = inputs(queries, m, heads, width)
    run = partial(call, backend, work == "backward", *tensors)
    found, time = "-", math.nan
    try:
        distance = error(run(), *tensors)
        if distance > TOLERANCE:
            found = f"WRONG by {distance:.1g}"
        elif CUDA:
            from triton.testing import do_bench

            found = time = 1e3 * do_bench(run, quantiles=[0.5])
        else:
            found = time = 1e6 * Timer("run()", globals={"run": run}).blocked_autorange().median
    except (RuntimeError, InputError) as reason:
        print(f"{backend}: {reason}", file=sys.stderr)
    results.add({"queries x keys x width, heads": f"{queries}x{m}x{width}, {heads}", "work": work, backend: found})
    return time


def main() -> None:
    results = Results("attention", f"Attention, {DTYPE}, median µs on the device", key=2)
    timed, shapes = partial(measure, results), SHAPES[1:2] if SMALL else SHAPES
    kinds = [{"keys": keys, "work": work} for keys in ("self", "cross") for work in ("forward", "backward")]
    try:
        from triton.testing import Benchmark, perf_report

        args = ["queries", "heads", "width"], shapes, "backend", BACKENDS, BACKENDS
        axes = {"ylabel": "µs", "x_log": True, "y_log": True}
        reports = [Benchmark(*args, "-".join([results.file.name, *kind.values()]), kind, **axes) for kind in kinds]
        perf_report(reports)(timed).run(save_path=str(RESULTS))
    except ImportError:  # of Triton, or of matplotlib and pandas, which its report needs
        for kind, shape, backend in product(kinds, shapes, BACKENDS):
            timed(*shape, backend, **kind)
    if "WRONG" in repr(results.rows):
        sys.exit("some results were wrong: see above")


if __name__ == "__main__":
    main()
