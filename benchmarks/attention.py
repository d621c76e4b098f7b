"""Time attention at Stable Diffusion's shapes: this project's kernels beside each of PyTorch's backends.

    python -m benchmarks.attention

Every attention of Stable Diffusion 1.5 at 512x512 and the largest of 2.1 at 768x768, self and cross (77 tokens), batch
2 (guidance's). Each result is first held against float64 in one head; one that is wrong is not timed. Times are those
of the device, by Triton's `do_bench`, with a cold L2 cache: at small shapes a call from Python takes longer.
"""

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
        o = attention(q, k, v, backend if backend in ("fused", "reference") else "sdpa")
        return o, *(torch.autograd.grad(o, (q, k, v), do) if backward else ())


def measure(results: Results, queries: int, heads: int, width: int, backend: str, keys: str, work: str) -> float:
    """The median time on the device in µs, NaN where the backend cannot do it or is wrong; `results` has it at once."""
    m, backward = queries if keys == "self" else TOKENS, work == "backward"
    tensors = inputs(queries, m, heads, width)
    run = partial(call, backend, backward, *tensors)
    exact = call("reference", backward, *(x.detach()[-1:, -1:].double().requires_grad_() for x in tensors))
    row = {"queries x keys x width, heads": f"{queries}x{m}x{width}, {heads}", "work": work, backend: "-"}
    try:
        errors = [(x[-1:, -1:] - e).norm() / e.norm() for x, e in zip(run(), exact, strict=True)]
        if not all(error <= TOLERANCE for error in errors):
            row[backend] = f"WRONG by {torch.stack(errors).max():.1g}"
        elif CUDA:
            from triton.testing import do_bench

            row[backend] = 1e3 * do_bench(run, quantiles=[0.5])
        else:
            row[backend] = 1e6 * Timer("run()", globals={"run": run}).blocked_autorange().median
    except (RuntimeError, InputError) as reason:
        print(f"{backend}: {reason}", file=sys.stderr)
    results.add(row)
    return float("nan") if isinstance(row[backend], str) else row[backend]


def main() -> None:
    results = Results("attention", f"Attention, {DTYPE}, median µs on the device; backward is with forward", key=2)
    timed, shapes = partial(measure, results), SHAPES[1:2] if SMALL else SHAPES
    kinds = [{"keys": keys, "work": work} for keys in ("self", "cross") for work in ("forward", "backward")]
    try:
        from triton.testing import Benchmark, perf_report

        args = ["queries", "heads", "width"], shapes, "backend", BACKENDS, BACKENDS
        name = lambda kind: "-".join([results.file.name, *kind.values()])
        reports = [Benchmark(*args, name(kind), kind, ylabel="µs", x_log=True, y_log=True) for kind in kinds]
        perf_report(reports)(timed).run(save_path=str(RESULTS))
    except ImportError:  # of Triton, or of matplotlib and pandas, which its report needs
        for kind, shape, backend in product(kinds, shapes, BACKENDS):
            timed(*shape, backend, **kind)
    if "WRONG" in repr(results.rows):
        sys.exit("some results were wrong: see above")


if __name__ == "__main__":
    main()
