"""Time attention at Stable Diffusion's shapes: this project's kernels beside each of PyTorch's backends.

    python -m benchmarks.attention            # into benchmarks/results/attention-MACHINE.{json,md}

Every attention of Stable Diffusion 1.5 at 512x512 and the largest of 2.1 at 768x768, self and cross (77 tokens), batch
2 (guidance's), forward and forward with backward, in bfloat16 on CUDA, else float32. q, k and v are views of fused
projections, as in the UNet. Each result is first held against float64 in one head; one that is wrong is not timed.

Times are the device's, by `triton.testing.do_bench`, which flushes the L2 cache and launches ahead. At small shapes a
call from Python takes longer than that: benchmarks/unet.py shows what it costs in a whole step.
"""

import sys
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer

from benchmarks.writing import CUDA, DEVICE, DTYPE, SMALL, Results
from errors import InputError
from models.attention import attention

BATCH, TOKENS = 2, 77
LEVELS = [(64, 8, 40), (32, 8, 80), (16, 8, 160), (8, 8, 160), (96, 5, 64)]  # pixels on a side, heads, width of a head
SDPA = {name: getattr(SDPBackend, f"{name.upper()}_ATTENTION") for name in ("flash", "efficient", "cudnn")}
BACKENDS = ["fused", "default", *SDPA]  # default: PyTorch's own choice
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[DTYPE]  # ‖result - exact‖ / ‖exact‖


def inputs(n: int, m: int, heads: int, d: int) -> list[Tensor]:
    """q, k, v as they leave the projections, and the gradient of the output, as the next one gives it."""

    def projection(length: int, parts: int) -> Tensor:
        x = torch.randn(BATCH, length, parts * heads * d, device=DEVICE).to(DTYPE)
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
    """The largest relative error against float64 in the last head."""
    leaves = [x.detach()[-1, -1].double().requires_grad_() for x in (q, k, v)]
    o = (leaves[0] @ leaves[1].mT * q.shape[-1] ** -0.5).softmax(-1) @ leaves[2]
    expected = o, *torch.autograd.grad(o, leaves, do[-1, -1].double())
    distances = [(x[-1, -1] - e).norm() / e.norm() for x, e in zip(found, expected, strict=False)]
    return torch.stack(distances).detach().nan_to_num(torch.inf).max().item()


def measure(backend: str, backward: bool, tensors: list[Tensor]) -> float | str:
    """The median time on the device in microseconds, "-" where the backend cannot do it, or how wrong it is."""
    work = partial(call, backend, backward, *tensors)
    try:
        distance = error(work(), *tensors)
    except (RuntimeError, InputError) as reason:
        print(f"{backend}: {reason}", file=sys.stderr)
        return "-"
    if distance > TOLERANCE:
        return f"WRONG by {distance:.1g}"
    if not CUDA:
        return 1e6 * Timer("work()", globals={"work": work}).timeit(10).median
    from triton.testing import do_bench

    return 1e3 * do_bench(work, quantiles=[0.5])


def main() -> None:
    results = Results("attention", f"Attention, {DTYPE}, median µs on the device", key=2)
    for side, heads, d in LEVELS[2:3] if SMALL else LEVELS:
        for m in (side**2, TOKENS):
            tensors = inputs(side**2, m, heads, d)
            for name in ("forward", "forward and backward"):
                row = {"queries x keys x width, heads": f"{side**2}x{m}x{d}, {heads}", "pass": name}
                results.add(row | {backend: measure(backend, name != "forward", tensors) for backend in BACKENDS})
    if "WRONG" in repr(results.rows):
        sys.exit("some results were wrong: see above")


if __name__ == "__main__":
    main()
