"""The UNet's forward pass and its tuning steps, with this project's settings on and off, beside a straightforward eager
implementation of the same network.

    python benchmarks/unet.py                         # all of it that fits this machine, into benchmarks/results/
    python benchmarks/unet.py --models openmoji64 --passes forward tuning --repeats 20
    python benchmarks/unet.py --profile               # where the time goes, operation by operation

The plain implementation has the same weights and gives the same result (checked here, to the dtype's rounding). It has
PyTorch's own layers in PyTorch's own memory layout, separate products for queries, keys and values, and projects the
text at every step. Its attention is `scaled_dot_product_attention`, its guidance one batch of two, as in the usual
libraries, so neither counts for us. On a CPU without instructions for half precision it lies channels last in that, for
else a step takes minutes.

forward     with classifier-free guidance, no gradients: a step of sampling
embedding   forward and backward to the text, weights frozen: a step of Imagic's stage A
tuning      forward, backward and Adam on all weights, for half precision on float32 copies: a step of Imagic's stage B

Sides take turns. On a CPU the plain side is timed in two states of the process: first as the system manages memory,
and, in turn with ours, with freed memory kept (`models.placement.keep_memory`).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import models
from benchmarks.writing import keep, kept, machine, table
from methods.base import update
from models import layers
from models.attention import CrossAttention, SelfAttention, attention, use_backend, why_not_fused
from models.placement import choose_channels_last, keep_memory
from models.unet import UNet

PASSES = ("forward", "embedding", "tuning")
LIMIT = 150  # seconds; a side that took as long is not run again after its second time


class PlainSelfAttention(nn.Module):
    def __init__(self, ours: SelfAttention):
        super().__init__()
        self.heads, self.to_out = ours.heads, ours.to_out
        self.to_q, self.to_k, self.to_v = (linear_of(w) for w in ours.to_qkv.weight.chunk(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(to(x), "b n (h d) -> b h n d", h=self.heads) for to in (self.to_q, self.to_k, self.to_v))
        return self.to_out(rearrange(attention(q, k, v, "sdpa"), "b h n d -> b n (h d)"))


class PlainCrossAttention(nn.Module):
    def __init__(self, ours: CrossAttention):
        super().__init__()
        self.heads, self.index, self.to_q, self.to_out = ours.heads, ours.index, ours.to_q, ours.to_out
        self.to_k, self.to_v = (linear_of(w) for w in ours.to_kv.weight.chunk(2))

    def project(self, context: Tensor) -> tuple[Tensor, ...]:
        return tuple(rearrange(to(context), "b l (h d) -> b h l d", h=self.heads) for to in (self.to_k, self.to_v))

    def forward(self, x: Tensor, kv: tuple[Tensor, Tensor]) -> Tensor:
        q = rearrange(self.to_q(x), "b n (h d) -> b h n d", h=self.heads)
        return self.to_out(rearrange(attention(q, *kv, "sdpa"), "b h n d -> b n (h d)"))


class PlainUNet(UNet):
    def _cross_attentions(self) -> list[nn.Module]:
        return [m for m in self.modules() if isinstance(m, CrossAttention | PlainCrossAttention)]


def linear_of(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(*weight.T.shape, bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    return layer


def plain(unet: UNet) -> UNet:
    """The straightforward implementation, with copies of the weights of `unet`."""
    unet = copy.deepcopy(unet).to(memory_format=torch.contiguous_format)
    for module in list(unet.modules()):
        for name, child in module.named_children():
            if isinstance(child, SelfAttention):
                setattr(module, name, PlainSelfAttention(child))
            elif isinstance(child, CrossAttention):
                setattr(module, name, PlainCrossAttention(child))
    for module in unet.modules():
        if type(module) in (layers.Conv2d, layers.Linear):
            module.__class__ = type(module).__base__  # torch's
    unet.__class__ = PlainUNet
    return unet


def network(name: str, device: torch.device, dtype: torch.dtype) -> tuple[UNet, int, tuple[int, int]]:
    """The UNet, its latent's side, and the text's length and width."""
    if name == "openmoji64":
        model = models.load(Path(__file__).parent.parent / "checkpoints" / name, device=device, dtype=dtype)
        unet, side, text = model.unet, model.latent_shape[-1], model.encode_text(["a cat"]).shape[1:]
    else:
        torch.manual_seed(0)
        with device:
            unet, side, text = UNet(num_heads=8).to(dtype), 64, (77, 768)
            for p in unet.parameters():  # last layers start at zero, and would hide what comes before
                if not p.any():
                    p.data.normal_(0, 0.02)
    return unet.eval().requires_grad_(False), side, tuple(text)


class Bench:
    """One network with its inputs, its twin, and the sides that are timed."""

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.ours, side, text = network(name, device, dtype)
        self.ours.to(memory_format=torch.contiguous_format)
        self.twin = plain(self.ours)
        if layers.emulated(device, dtype):  # in PyTorch's own layout a single step then takes more than eight minutes
            self.twin.to(memory_format=torch.channels_last)
        self.last = choose_channels_last("auto", device, dtype)
        layouts = torch.contiguous_format, torch.channels_last
        self.other = copy.deepcopy(self.ours).to(memory_format=layouts[not self.last])
        self.ours.to(memory_format=layouts[self.last])
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(2, 4, side, side, generator=generator).to(device, dtype)
        self.context = torch.randn(2, *text, generator=generator).to(device, dtype)
        self.t = torch.tensor(500, device=device)

    def sides(self, what: str) -> dict[str, Callable[[], object]]:
        """The work of each side but the plain one in its first state, the full settings first."""
        make = {"forward": self.forward, "embedding": self.embedding, "tuning": self.tuning}[what]
        full = make(self.ours, ours=True)
        sides = {"ours": full, "plain": make(self.twin, ours=False)}
        sides["ours, other memory layout"] = make(self.other, ours=True)
        if what == "forward":
            sides["ours, text projected at every step"] = make(self.ours, ours=False)
            if self.device.type == "cpu" and self.last:
                theirs = partial(mock.patch.object, layers, "MANY", sys.maxsize)
                sides["ours, PyTorch's convolutions"] = inside(theirs, full)
        if what == "tuning":
            sides["ours, Adam not fused"] = make(self.ours, ours=False)
        if self.device.type == "cuda":
            sides["ours, compiled"] = make(torch.compile(self.ours), ours=True)
            if not why_not_fused(self.device):
                sides["ours, fused attention"] = inside(partial(use_backend, "fused"), full)
        return sides

    def forward(self, unet: UNet, ours: bool) -> Callable[[], Tensor]:
        kept = []

        @torch.no_grad()
        def work() -> Tensor:
            if ours and not kept:
                kept.append(unet.project_context(self.context))
            return unet(self.x, self.t, kept[0] if ours else self.context)

        return work

    def embedding(self, unet: UNet, ours: bool) -> Callable[[], Tensor]:
        def work() -> Tensor:
            context = self.context[:1].clone().requires_grad_()
            unet(self.x[:1], self.t, context).float().square().mean().backward()
            return context.grad

        return work

    def tuning(self, unet: UNet, ours: bool) -> Callable[[], None]:
        pairs = [(p, p.detach().float()) for p in unet.parameters()]  # as in methods.base.minimise
        optimizer = torch.optim.Adam([master for _, master in pairs], lr=0.0, fused=ours or None)

        def work() -> None:
            unet.requires_grad_(True)
            unet(self.x[:1], self.t, self.context[:1]).float().square().mean().backward()
            update(optimizer, pairs)
            unet.requires_grad_(False)

        return work

    def timed(self, work: Callable[[], object]) -> float:
        """Milliseconds."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return 1e3 * (time.perf_counter() - start)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def check(self, what: str) -> float:
        """The norm of the difference between the two results, by that of the plain one. Raises where it is more than
        rounding makes of a hundred layers."""
        found, expected = (work().double() for work in list(self.sides(what).values())[:2])
        difference = float((found - expected).norm() / expected.norm())
        single = 5e-3 if self.device.type == "cuda" else 1e-5  # CUDA's convolutions are in TF32
        if not difference < (single if self.dtype == torch.float32 else 5e-2):
            sys.exit(f"{what} in {self.dtype}: the results differ by {difference:.1e}")
        return difference


def inside(context: Callable[[], AbstractContextManager], work: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with context():
            return work()

    return run


def rounds(bench: Bench, sides: dict, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every side, in turns, after one each that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for name, side in sides.items():
        print(f"  {name}: {bench.timed(side):.0f} ms at first", file=sys.stderr, flush=True)
    for i in range(repeats):
        for name, side in sides.items():
            if i < 2 or sum(times[name]) < 1e3 * LIMIT:
                times[name].append(bench.timed(side))
    return times


def measure(name: str, dtype: torch.dtype, device: torch.device, passes: list[str], repeats: int, first: bool) -> list:
    """Rows for one network and dtype. `first`: before memory is kept; only the plain side."""
    bench, rows = Bench(name, device, dtype), []
    for what in passes:
        large = name != "openmoji64" and device.type == "cpu"
        if large and (what == "tuning" or (what == "embedding" and dtype != torch.float32)):
            continue  # it takes more than 24 GB, or in half precision hours
        print(f"{name}, {dtype}, {what}", file=sys.stderr, flush=True)
        sides = bench.sides(what)
        if first:
            sides = {"plain, memory not kept": sides["plain"]}
        difference = None if first or what == "tuning" else bench.check(what)
        for side, times in rounds(bench, sides, repeats).items():
            row = {"model": name, "dtype": str(dtype).removeprefix("torch."), "pass": what, "side": side, "ms": times}
            rows.append(row | ({"difference": difference} if side == "ours" and difference is not None else {}))
    return rows


def report(rows: list[dict]) -> str:
    text = []
    for key in dict.fromkeys((r["model"], r["dtype"], r["pass"]) for r in rows if r["side"] == "ours"):
        here = {r["side"]: r for r in rows if (r["model"], r["dtype"], r["pass"]) == key}
        ours = statistics.median(here["ours"]["ms"])
        text.append("## {}, {}, {}\n".format(*key))
        if "difference" in here["ours"]:
            text.append(f"Results of ours and plain differ by {here['ours']['difference']:.1e} of their norm.\n")
        lines = []
        for side, row in sorted(here.items(), key=lambda item: statistics.median(item[1]["ms"])):
            times = row["ms"]
            median = statistics.median(times)
            spread = f"{min(times):.1f}-{max(times):.1f}"
            lines.append((side, f"{median:.1f}", spread, len(times), f"{median / ours:.2f}"))
        text.append(table(["side", "median ms", "range", "times", "by ours"], lines))
    return "\n".join(text)


def profiled(name: str, dtype: torch.dtype, device: torch.device) -> str:
    """The operations that a guided forward pass of both sides, and a tuning step of the small model, spend time in."""
    bench, text = Bench(name, device, dtype), []
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    for what in ("forward", "tuning") if name == "openmoji64" else ("forward",):
        for side in ("plain", "ours"):
            work = bench.sides(what)[side]
            bench.timed(work)
            with profile(activities=activities) as found:
                bench.timed(work)
            cuda = device.type == "cuda"
            time_of = (lambda e: e.self_device_time_total) if cuda else (lambda e: e.self_cpu_time_total)
            # An operation's time on the card is its kernels', which are listed as well.
            operations = (e for e in found.key_averages() if e.device_type == DeviceType.CPU)
            events = sorted(operations, key=time_of, reverse=True)
            whole = sum(map(time_of, events))
            text.append(f"## {name}, {dtype}, {what}, {side}: {whole / 1e3:.0f} ms\n")
            rows = [(e.key, f"{time_of(e) / 1e3:.1f}", f"{time_of(e) / whole:.1%}", e.count) for e in events[:14]]
            text.append(table(["operation", "ms", "share", "calls"], rows))
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the UNet against a plain implementation.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=["openmoji64", "sd15"], default=["openmoji64", "sd15"])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--repeats", type=int, help="of each side: 20 (sd15 on a CPU: 3)")
    parser.add_argument("--profile", action="store_true", help="list operations instead")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.index is not None:
        torch.cuda.set_device(device)
    about = f"{machine(device)}, torch {torch.__version__}"
    cells = [
        (model, getattr(torch, dtype))
        for model in options.models
        for dtype in options.dtypes
        or (["float32"] if (model, device.type) == ("openmoji64", "cpu") else ["float32", "bfloat16"])
    ]
    if options.profile:
        keep_memory()
        text = f"# Operations of the UNet: {about}\n\n" + "\n".join(profiled(*cell, device) for cell in cells)
        print(text)
        keep(f"profile-{machine(device).split(' (')[0]}", text)
        return
    file = f"unet-{machine(device).split(' (')[0]}"
    now = {(model, str(dtype).removeprefix("torch."), what) for model, dtype in cells for what in options.passes}
    rows = [r for r in kept(file, about).get("rows", []) if (r["model"], r["dtype"], r["pass"]) not in now]
    for first in (True, False) if device.type == "cpu" else (False,):
        if not first:
            keep_memory()
        for model, dtype in cells:
            if first and dtype != torch.float32:
                continue  # where it takes a minute a step, memory is not what it takes it for
            repeats = options.repeats or (3 if model == "sd15" and device.type == "cpu" else 20)
            rows += measure(model, dtype, device, list(options.passes), repeats, first)
            if not first:  # now, so that an interrupted run leaves what it has found
                text = f"# UNet: {about}\n\n{report(rows)}"
                keep(file, text, {"machine": about, "rows": rows})
    print(text)


if __name__ == "__main__":
    main()
