"""Time the steps of a network and measure their memory.

    python -m benchmarks.unet --models sd15 --steps guided --modes eager compiled plain plain-compiled

Models: the shipped one, Stable Diffusion 1.5 at 512 pixels, XL and 3.5 medium at 1024, with random weights. Steps: of
sampling, `guided` in one batch of two; of Imagic's stages A and B, by what Adam moves, on float32 copies. Modes: eager,
torch.compile, the step as a CUDA graph; with `fused` attention; and UNets in their `plain` form.
"""

import argparse
import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import product
from types import MethodType

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.benchmark import timer

from benchmarks.writing import CUDA, DEVICE, DTYPE, SMALL, Results, peak
from files import CLONE
from methods.lora import adapters, in_attention
from methods.optimisation import update
from models.attention import CrossAttention, SelfAttention
from models.graphs import captured
from models.mmdit import SD35_MEDIUM, MMDiT
from models.unet import SD1, SDXL, ProjectedContext, SpatialTransformer, UNet

STEPS = ("guided", "embedding", "all", "attention", "lora")
MODES = ("eager", "compiled", "graph", "fused", "fused-graph", "plain", "plain-compiled")
SHIPPED = json.loads((CLONE / "checkpoints/openmoji64/config.json").read_text())["unet"]
NETWORKS = {  # kind, sizes, channels and side of the latent, text states, width of the text's vector
    "openmoji64": (UNet, SHIPPED, 4, 16, (40, 192), 0),
    "sd15": (UNet, SD1, 4, 64, (77, 768), 0),
    "sdxl": (UNet, SDXL, 4, 128, (77, 2048), 1280),
    "sd35": (MMDiT, SD35_MEDIUM, 16, 128, (333, 4096), 2048),
}
FEW = {UNet: dict(model_channels=32, channel_mult=[1, 2], num_res_blocks=1, transformer_depth=1), MMDiT: {"depth": 2}}


def network(name: str) -> tuple[nn.Module, Tensor, list]:
    """The network, noisy latents (2, c, h, w), and the text's states (2, L, C) and vector (2, D), if it takes one."""
    torch.manual_seed(0)
    kind, sizes, channels, side, states, width = NETWORKS[name]
    side, few = (16, FEW[kind]) if SMALL else (side, {})
    shapes = (channels, side, side), states, *([(width,)] if width else ())
    with DEVICE:
        net = kind(**sizes | few).to(DTYPE, memory_format=torch.channels_last if CUDA else None)  # as edit.py
        x, *text = (torch.randn(2, *shape, dtype=DTYPE) for shape in shapes)
    return net.eval().requires_grad_(False), x, text


def plain(net: UNet) -> None:
    """Make a UNet, in place, compute the same as it is commonly written: q, k and v each by a layer, those of the text
    in every step; projections of feature maps by 1x1 convolutions; attention by PyTorch."""

    def attend(self: SelfAttention | CrossAttention, x: Tensor, states: Tensor | None = None) -> Tensor:
        y = x if states is None else states
        qkv = self.to_q(x), self.to_k(y), self.to_v(y)
        o = self.attention(*(rearrange(z, "b n (h d) -> b h n d", h=self.heads) for z in qkv))
        return self.to_out(rearrange(o, "b h n d -> b n (h d)"))

    def transform(self: SpatialTransformer, x: Tensor, context: ProjectedContext) -> Tensor:
        y = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c")
        for block in self.transformer_blocks:
            y = block(y, context.states)
        return x + self.proj_out(rearrange(y, "b (h w) c -> b c h w", h=x.shape[-2]))

    def replace(module: nn.Module, name: str, layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> None:
        layer.weight, layer.bias = nn.Parameter(weight), bias
        setattr(module, name, layer)

    net.attention.backend = "sdpa"
    net.project_context = ProjectedContext  # the text goes to the layers as it is
    for m in [*net.modules()]:
        if isinstance(m, SelfAttention | CrossAttention):
            m.forward, fused = MethodType(attend, m), "to_kv" if isinstance(m, CrossAttention) else "to_qkv"
            for part, weight in zip(fused[3:], getattr(m, fused).weight.split(m.to_out.in_features), strict=True):
                replace(m, f"to_{part}", nn.Linear(1, 1, bias=False), weight)
            delattr(m, fused)
        elif isinstance(m, SpatialTransformer):
            m.forward = MethodType(transform, m)
            for name, linear in (("proj_in", m.proj_in), ("proj_out", m.proj_out)):
                replace(m, name, nn.Conv2d(1, 1, 1), linear.weight[..., None, None], linear.bias)


def step_of(kind: str, net: nn.Module, x: Tensor, text: list[Tensor], during: ExitStack) -> Callable[[], object]:
    """A function that does one step."""
    net.requires_grad_(False)
    t, pixels = torch.full((len(x),), 500, device=x.device), (8 * x.shape[-2], 8 * x.shape[-1])
    if kind == "guided":
        during.enter_context(torch.no_grad())
        return partial(net, x, t, net.project_context(*text), pixels)
    states, *vector = (part[:1].clone() for part in text)
    params = {"states": states} if kind == "embedding" else dict(net.named_parameters())
    if kind == "lora":
        params = during.enter_context(adapters(net, 8, torch.Generator().manual_seed(0)))
    names = in_attention(params) if kind == "attention" else params
    pairs = [(params[name].requires_grad_(), params[name].detach().float()) for name in names]
    optimizer = torch.optim.Adam([master for _, master in pairs], lr=0.0, fused=True, capturable=CUDA)

    def work() -> None:
        net(x[:1], t[:1], net.project_context(states, *vector), pixels).float().square().mean().backward()
        update(optimizer, pairs)

    return work


def measure(kind: str, mode: str, net: nn.Module, x: Tensor, text: list[Tensor]) -> dict:
    """Milliseconds of each of ten steps, or of fewer in 20 s, after three; on CUDA the peak memory; or why not."""
    times = []
    try:
        torch.compiler.reset()  # or the limit of graphs for one function is met
        peak()
        with ExitStack() as during:
            step = step_of(kind, torch.compile(net) if "compiled" in mode else net, x, text, during)
            work = captured(step)[0] if "graph" in mode else step
            while len(times) < 3 + 10 and sum(times[3:]) < 20e3:
                start = timer()  # which waits for the device
                work()
                times.append(1e3 * (timer() - start))
    except Exception as error:  # of memory, of a compiler, of a backend that is not there
        return {"ms": repr(error)[:90], "peak, GB": "-"}
    return {"ms": times[3:], "peak, GB": peak()}


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, choices, default in (("models", NETWORKS, 1), ("steps", STEPS, 5), ("modes", MODES, 1)):
        parser.add_argument(f"--{name}", nargs="+", choices=choices, default=[*choices][:default])
    o = parser.parse_args()
    results = Results("unet", "Steps of networks", key=4)
    for model, mode in product(o.models, o.modes):
        if "plain" in mode and NETWORKS[model][0] is not UNet:
            continue
        net, *inputs = network(model)
        net.attention.backend = "fused" if "fused" in mode else "auto"
        if "plain" in mode:
            plain(net)
        for step in o.steps:
            row = {"model": model, "dtype": str(DTYPE)[6:], "step": step, "mode": mode}
            results.add(row | measure(step, mode, net, *inputs))


if __name__ == "__main__":
    main()
