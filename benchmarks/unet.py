"""Time the steps of a network and measure their memory: sampling, embedding, and each way of tuning.

    python -m benchmarks.unet                           # into benchmarks/results/unet-MACHINE.{json,md}
    python -m benchmarks.unet --models sd15 --steps guided --modes compiled

Models: the shipped one; Stable Diffusion 1.5 at 512 pixels, XL and 3.5 medium at 1024, with random weights. Steps:

guided     classifier-free guidance in one batch of two, no gradients, text projected once: a step of sampling
embedding  forward and backward to the text, weights frozen: a step of Imagic's stage A
all, attention, lora   forward, backward and Adam, in half precision on float32 copies: a step of Imagic's stage B

Modes: eager, compiled (torch.compile), and on CUDA graph (the step as one CUDA graph). A step that fails leaves a row.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import product

import torch
from torch import Tensor, nn

import models
from benchmarks.writing import CUDA, DEVICE, DTYPE, SMALL, Results
from files import CLONE
from methods.lora import adapters, in_attention
from methods.optimisation import update
from models.graphs import captured
from models.mmdit import SD35_MEDIUM, MMDiT
from models.unet import SD1, SDXL, UNet

STEPS = ("guided", "embedding", "all", "attention", "lora")
MODES = ("eager", "compiled", "graph")
NETWORKS = {  # kind, sizes, latent, text states, width of the text's vector
    "sd15": (UNet, SD1, (4, 64, 64), (77, 768), 0),
    "sdxl": (UNet, SDXL, (4, 128, 128), (77, 2048), 1280),
    "sd35": (MMDiT, SD35_MEDIUM, (16, 128, 128), (333, 4096), 2048),
}
FEW = {UNet: {"model_channels": 32, "transformer_depth": 1}, MMDiT: {"depth": 2, "dual_attention_layers": [0]}}


def network(name: str) -> tuple[nn.Module, Tensor, list]:
    """The network, noisy latents (2, c, h, w), and the text's states (2, L, C) and vector (2, D), if it takes one."""
    torch.manual_seed(0)
    if name == "openmoji64":
        net = models.load(CLONE / "checkpoints" / name, device=DEVICE, dtype=DTYPE).unet
        latent, states, width = (4, 16, 16), (40, 192), 0
    else:
        kind, sizes, (c, *sides), states, width = NETWORKS[name]
        latent = c, *(side // 8 if SMALL else side for side in sides)
        with DEVICE:
            net = kind(**sizes | (FEW[kind] if SMALL else {})).to(DTYPE)
    net.to(memory_format=torch.channels_last if CUDA else torch.contiguous_format)  # as edit.py
    x, *text = (torch.randn(2, *shape).to(DEVICE, DTYPE) for shape in (latent, states, *([(width,)] if width else ())))
    return net.eval().requires_grad_(False), x, text


@contextmanager
def step_of(kind: str, net: nn.Module, x: Tensor, text: list[Tensor]) -> Iterator[Callable[[], object]]:
    """Inside, a call is one step."""
    net.requires_grad_(False)
    t, pixels = torch.full((len(x),), 500, device=x.device), (8 * x.shape[-2], 8 * x.shape[-1])
    if kind == "guided":
        with torch.no_grad():
            projected = net.project_context(*text)
            yield torch.no_grad()(lambda: net(x, t, projected, pixels))
        return

    def backward(states: Tensor) -> None:
        projected = net.project_context(states, *(vector[:1] for vector in text[1:]))
        net(x[:1], t[:1], projected, pixels).float().square().mean().backward()

    if kind == "embedding":
        states = text[0][:1].clone().requires_grad_()
        yield lambda: backward(states)
        return
    names = in_attention(dict(net.named_parameters())) if kind == "attention" else dict(net.named_parameters())
    moved = nullcontext({name: net.get_parameter(name) for name in names})
    with adapters(net, 8, torch.Generator().manual_seed(0)) if kind == "lora" else moved as params:
        pairs = [(p.requires_grad_(), p.detach().float()) for p in params.values()]
        optimizer = torch.optim.Adam([master for _, master in pairs], lr=0.0, fused=True, capturable=CUDA)

        def work() -> None:
            backward(text[0][:1])
            update(optimizer, pairs)

        yield work


def measure(kind: str, mode: str, net: nn.Module, x: Tensor, text: list[Tensor]) -> dict:
    """Milliseconds of each of ten steps, after three that do not count, and on CUDA the peak memory; or why not."""
    times = []
    try:
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        with step_of(kind, torch.compile(net) if mode == "compiled" else net, x, text) as step:
            work = captured(step)[0] if mode == "graph" else step
            for _ in range(3 + 10):
                start = time.perf_counter()
                work()
                if CUDA:
                    torch.cuda.synchronize()
                times.append(1e3 * (time.perf_counter() - start))
    except Exception as error:  # of memory, of a compiler, of a backend that is not there
        return {"ms": repr(error)[:90]}
    return {"ms": times[3:], "peak, GB": torch.cuda.max_memory_allocated() / 1e9 if CUDA else "-"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", choices=["openmoji64", *NETWORKS], default=["openmoji64"])
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES[:1])
    parser.add_argument("--attentions", nargs="+", default=["auto"])
    o = parser.parse_args()
    results = Results("unet", "Steps of networks", key=5)
    for model in o.models:
        net, *inputs = network(model)
        for mode, step, attention in product(o.modes, o.steps, o.attentions):
            net.attention.backend = attention
            row = {"model": model, "dtype": str(DTYPE)[6:], "step": step, "mode": mode, "attention": attention}
            results.add(row | measure(step, mode, net, *inputs))


if __name__ == "__main__":
    main()
