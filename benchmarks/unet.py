"""Time the UNet's steps and measure their memory: sampling, embedding and tuning, with each choice of attention.

    python -m benchmarks.unet                           # into benchmarks/results/unet-MACHINE.{json,md}
    python -m benchmarks.unet --models sd15 --steps guided --modes compiled

Models: the shipped one, and the UNet of Stable Diffusion 1.5 with random weights at 512 pixels.

guided     classifier-free guidance in one batch of two, no gradients, text projected once: a step of sampling
embedding  forward and backward to the text, weights frozen: a step of Imagic's stage A
all, attention, lora   forward, backward and Adam, in half precision on float32 copies: a step of Imagic's stage B

Modes: eager; compiled (torch.compile) and graph (one CUDA graph) for guided steps on CUDA. Rows of an earlier run on
the same machine stay, unless they are measured again.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

import models
from benchmarks.writing import keep, kept, machine, table
from methods.lora import adapters, in_attention
from methods.optimisation import update
from models.graphs import captured
from models.unet import UNet

STEPS = ("guided", "embedding", "all", "attention", "lora")
MODES = ("eager", "compiled", "graph")
KEY = ("model", "dtype", "step", "mode", "attention")


def network(name: str, device: torch.device, dtype: torch.dtype) -> tuple[UNet, Tensor, Tensor]:
    """The UNet, noisy latents (2, c, h, w) and text states (2, L, C)."""
    torch.manual_seed(0)
    if name == "openmoji64":
        folder = Path(__file__).resolve().parent.parent / "checkpoints" / name
        unet, shape, text = models.load(folder, device=device, dtype=dtype).unet, (2, 4, 16, 16), (2, 40, 192)
    else:
        with device:
            unet, shape, text = UNet(num_heads=8).to(dtype), (2, 4, 64, 64), (2, 77, 768)
    if device.type == "cuda" and dtype != torch.float32:  # as edit.py
        unet.to(memory_format=torch.channels_last)
    x, context = torch.randn(shape).to(device, dtype), torch.randn(text).to(device, dtype)
    return unet.eval().requires_grad_(False), x, context


@contextmanager
def step_of(kind: str, unet: UNet, x: Tensor, context: Tensor) -> Iterator[Callable[[], object]]:
    """Inside, a call is one step."""
    t = torch.full((len(x),), 500, device=x.device)
    if kind == "guided":
        with torch.no_grad():
            projected = unet.project_context(context)
            yield torch.no_grad()(lambda: unet(x, t, projected))
        return

    def backward(e: Tensor) -> None:
        unet(x[:1], t[:1], e).float().square().mean().backward()

    if kind == "embedding":
        yield lambda: backward(context[:1].clone().requires_grad_())
        return
    names = [name for name, _ in unet.named_parameters()]
    names = in_attention(names) if kind == "attention" else names
    moved = nullcontext({name: unet.get_parameter(name) for name in names})
    if kind == "lora":
        moved = adapters(unet, 8, torch.Generator().manual_seed(0))
    with moved as params:
        pairs = [(p.requires_grad_(), p.detach().float()) for p in params.values()]
        optimizer = torch.optim.Adam([master for _, master in pairs], lr=0.0, fused=True)

        def work() -> None:
            backward(context[:1])
            update(optimizer, pairs)

        yield work
    unet.requires_grad_(False)


def measure(work: Callable[[], object], cuda: bool) -> dict:
    """Milliseconds of each of ten steps, after three that do not count, and on CUDA the peak memory."""
    times = []
    for i in range(3 + 10):
        if cuda and i == 3:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return {"ms": times[3:], "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None}


def report(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        ms, peak = row["ms"], row["peak_gib"]
        spread = f"{min(ms):.1f}-{max(ms):.1f}"
        lines.append((*(row[k] for k in KEY), f"{statistics.median(ms):.1f}", spread, f"{peak:.2f}" if peak else "-"))
    return table([*KEY, "median ms", "range", "peak GiB"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the UNet's steps.")
    parser.add_argument("--models", nargs="+", choices=["openmoji64", "sd15"], help="on CPUs openmoji64, else both")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="bfloat16 on CUDA, else float32")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--modes", nargs="+", choices=MODES, help="on CUDA all, else eager")
    parser.add_argument("--attentions", nargs="+", help="on CUDA sdpa and fused, else auto and sdpa")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = options.dtype or ("bfloat16" if cuda else "float32")
    about = f"{machine(device)}, torch {torch.__version__}"
    file = f"unet-{machine(device).split(' (')[0]}"
    rows = kept(file, about).get("rows", [])
    for model in options.models or (["openmoji64", "sd15"] if cuda else ["openmoji64"]):
        unet, x, context = network(model, device, getattr(torch, dtype))
        for step in options.steps:
            for mode in options.modes or (MODES if cuda else MODES[:1]):
                for attention in options.attentions or (("sdpa", "fused") if cuda else ("auto", "sdpa")):
                    if mode != "eager" and not (cuda and step == "guided"):
                        continue
                    unet.attention.backend = attention
                    with step_of(step, torch.compile(unet) if mode == "compiled" else unet, x, context) as work:
                        found = measure(captured(work)[0] if mode == "graph" else work, cuda)
                    key = dict(zip(KEY, (model, dtype, step, mode, attention), strict=True))
                    rows = [r for r in rows if {k: r[k] for k in KEY} != key] + [key | found]
                    print(report(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
                    # Now, so that an interrupted run leaves its rows.
                    keep(file, f"# Steps of the UNet: {about}\n\n{report(rows)}", {"machine": about, "rows": rows})
    print(report(rows))


if __name__ == "__main__":
    main()
