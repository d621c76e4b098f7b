"""How much memory the editing methods need with Stable Diffusion's networks, and what each way of saving saves.

    python benchmarks/memory.py                          # all parts, into benchmarks/results/
    python benchmarks/memory.py tables|check|slices      # one part

tables    Every way of tuning that Imagic has, and sampling, in bfloat16. The methods themselves run, two steps of each
          kind, on the meta device, whose tensors have sizes but no contents, while a dispatch mode counts the bytes of
          all storages alive. So the calculation knows what the code keeps and when it lets go. It does not know the
          workspaces inside kernels, the allocator's fragmentation, and the few hundred MB that CUDA takes for itself.
          On a CUDA device the same runs are made there too, and torch's allocator is asked.
check     On the CPU: that calculation beside the memory that a process of its own really took (Linux).
slices    The autoencoder whole and in strips: memory and time, calculated and measured on the machine at hand.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from benchmarks.writing import keep, machine, table
from data.tasks import EditTask
from methods import base
from methods.base import Reporter
from methods.direct_inversion import DirectInversion
from methods.imagic import Imagic
from models.autoencoder import Autoencoder
from models.latent_diffusion import build
from samplers import Sampler

SD1 = {
    "unet": {"num_heads": 8},
    "vae": {},
    "text": {"width": 768, "heads": 12, "layers": 12, "quick_gelu": True},
    "schedule": {},
}
SD2 = {
    "unet": {"num_head_channels": 64, "context_dim": 1024, "use_linear_projection": True},
    "vae": {},
    "text": {"width": 1024, "heads": 16, "layers": 24, "hidden_layer": "penultimate"},
    "schedule": {},
}
CASES = {"1.5 at 512": (SD1, 512), "2.1-base at 512": (SD2, 512), "2.1 at 768": ({**SD2, "prediction": "v"}, 768)}
# tuned, optimizer, checkpointing
CHECKED = [
    ("all", "adam", "off"),
    ("all", "adafactor", "on"),
    ("attention", "adam", "on"),
    ("attention", "adafactor", "off"),
    ("lora", "adam", "off"),
]
aten = torch.ops.aten
Table = tuple[str, list[dict[str, str | float]]]  # a title, and rows of text or of bytes


class Calculated(TorchDispatchMode):
    """Inside, the bytes of all tensors on the meta device are counted as they come and go. What is read from such a
    tensor is 1, and copied to the CPU it takes no memory."""

    device = "meta"

    def __init__(self) -> None:
        super().__init__()
        self.current = self.highest = 0
        self.alive: set[int] = set()

    def now(self) -> int:
        return self.current

    def peak(self) -> int:
        return self.highest

    def reset(self) -> None:
        self.highest = self.current

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        x = args[0] if args and isinstance(args[0], Tensor) and args[0].is_meta else None
        if x is not None and func is aten._local_scalar_dense.default:
            return 1.0
        if x is not None and func is aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
            return torch.zeros((), dtype=kwargs.get("dtype") or x.dtype, device="cpu").expand(x.shape)
        out = func(*args, **kwargs)
        tree_map_only(Tensor, self.count, out)
        return out

    def count(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if x.is_meta and storage._cdata not in self.alive:
            self.alive.add(storage._cdata)
            self.current += storage.nbytes()
            self.highest = max(self.highest, self.current)
            weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())

    def freed(self, key: int, size: int) -> None:
        self.alive.remove(key)
        self.current -= size


class OnCuda:
    """The bytes of all tensors on the current CUDA device."""

    device = "cuda"
    now = staticmethod(torch.cuda.memory_allocated)
    peak = staticmethod(torch.cuda.max_memory_allocated)
    reset = staticmethod(torch.cuda.reset_peak_memory_stats)


class OfProcess:
    """The memory that this process really has (Linux)."""

    device = "cpu"

    def now(self) -> int:
        return self.status("VmRSS")

    def peak(self) -> int:
        return self.status("VmHWM")

    def reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew

    def status(self, entry: str) -> int:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(entry))
        return int(line.split()[1]) * 1024


Memory = Calculated | OnCuda | OfProcess


@contextmanager
def calculating(memory: Calculated) -> Iterator[None]:
    """Inside, `memory` counts, and the meta device takes the paths that others take: fused attention, which keeps no
    map of all pairs, and Adam in place (one parameter at a time, for want of a fused step without contents)."""

    def fused(q: Tensor, k: Tensor, v: Tensor, *_, **__) -> Tensor:  # a mask changes no size
        return aten._scaled_dot_product_flash_attention(q, k, v)[0]

    def adam(params, lr):
        return torch.optim.Adam(params, lr=lr, foreach=False)

    fused_attention = mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", fused)
    with memory, fused_attention, mock.patch.dict(base.OPTIMIZERS, adam=adam):
        yield


class Ledger(Reporter):
    """Reads the memory at the moments that a method reports. Tuned states go by way of the CPU, as in edit.py."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.marks, self.peaks, self.gradients = memory, {}, {}, 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.memory.reset()
        yield
        self.peaks[name] = self.memory.peak()

    def progress(self, iterable: Iterable, stage: str, total: int | None = None) -> Iterator:
        for item in iterable:
            self.marks.setdefault((stage, "begin"), []).append(self.memory.now())
            yield item

    def scalar(self, stage: str, step: int, **values: float) -> None:  # told between forward and backward pass
        self.marks.setdefault((stage, "forward"), []).append(self.memory.now())

    def cached(self, key: dict, build: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: tensor.cpu() for name, tensor in build().items()}

    def before_step(self, optimizer: torch.optim.Optimizer, *_) -> None:
        held = [p.grad.nbytes for group in optimizer.param_groups for p in group["params"]]
        self.gradients = max(self.gradients, sum(held))


def nbytes(module: nn.Module) -> int:
    return sum(t.nbytes for t in module.state_dict().values())


def run(memory: Memory, config: dict, size: int, method, dtype: torch.dtype) -> dict[str, int]:
    """Bytes by name for one edit of a picture of size x size: what is held at certain moments of the tuning, the peak
    of each stage, and the highest of them."""
    calculated = isinstance(memory, Calculated)
    gc.collect()  # what an earlier run left
    with calculating(memory) if calculated else nullcontext(), torch.no_grad():
        model = build(config, seed=None if calculated else 0, meta=calculated).to(memory.device, dtype)
        task = EditTask(torch.zeros(1, 3, size, size, device=memory.device), "a sitting dog")
        ledger = Ledger(memory)
        watch = register_optimizer_step_pre_hook(ledger.before_step)
        method.edit(model, task, ledger)
        watch.remove()
    found = {"UNet": nbytes(model.unet), "text, autoencoder": nbytes(model.text) + nbytes(model.autoencoder)}
    if ("tuning", "begin") in ledger.marks:
        (first, second), (_, forward) = ledger.marks["tuning", "begin"], ledger.marks["tuning", "forward"]
        found |= {"float32 copies": first - sum(found.values()), "optimizer state": second - first}
        found |= {"gradients": ledger.gradients, "activations": forward - second, "before tuning": first}
    return found | ledger.peaks | {"highest": max(ledger.peaks.values())}


def imagic(embedding_steps: int = 0, **settings) -> Imagic:
    walk, tuning_steps = Sampler(steps=1), 2 if settings else 0
    settings |= {"embedding_steps": embedding_steps, "tuning_steps": tuning_steps}
    return Imagic(walk, **settings, guidance_scale=7.5, start="noise")


def tables() -> list[Table]:
    """What tuning takes, in each of its ways, and what the other stages take, for each network."""
    kinds = {"calculated": Calculated} | ({"measured": OnCuda} if torch.cuda.is_available() else {})
    held = ("UNet", "text, autoencoder", "float32 copies", "optimizer state", "gradients", "activations")
    ways = list(product(("all", "attention", "lora"), ("off", "on"), ("adam", "adafactor")))
    others = {
        "Imagic, embedding": ("embedding", imagic(2)),
        "Imagic, embedding, checkpointing": ("embedding", imagic(2, gradient_checkpointing=True)),
        "Imagic, sampling": ("editing", imagic()),
        "Direct Inversion": ("highest", DirectInversion(Sampler(steps=1))),
    }
    found = []
    for name, (config, size) in CASES.items():
        rows = []
        for tune, saving, optimizer in ways:
            method = imagic(tune=tune, gradient_checkpointing=saving == "on", tuning_optimizer=optimizer)
            numbers = {kind: run(memory(), config, size, method, torch.bfloat16) for kind, memory in kinds.items()}
            row = {"tuned": tune, "checkpointing": saving, "optimizer": optimizer}
            row |= {column: numbers["calculated"][column] for column in held}
            rows.append(row | {f"peak, {kind}": n["tuning"] for kind, n in numbers.items()})
            progress(name, rows)
        found.append((f"Tuning Stable Diffusion {name}, bfloat16", rows))
        rows = []
        for what, (stage, method) in others.items():
            numbers = {k: run(memory(), config, size, method, torch.bfloat16)[stage] for k, memory in kinds.items()}
            rows.append({"stage": what} | {f"peak, {kind}": n for kind, n in numbers.items()})
            progress(name, rows)
        found.append((f"Other stages, Stable Diffusion {name}, bfloat16", rows))
    return found


def small(tune: str, optimizer: str, saving: str) -> tuple[dict, Imagic]:
    """Stable Diffusion 1.5 with a UNet of three tenths of the width, for a CPU."""
    config = SD1 | {"unet": {"num_heads": 8, "model_channels": 96}, "vae": {"ch": 32}}
    return config, imagic(tune=tune, tuning_optimizer=optimizer, gradient_checkpointing=saving == "on")


def tuned(*settings: str) -> dict[str, int]:
    config, method = small(*settings)
    run(OfProcess(), config, 64, method, torch.float32)  # libraries and kernels are loaded after this
    return run(OfProcess(), config, 512, method, torch.float32)


def check() -> list[Table]:
    """What tuning takes beyond the weights: calculated, and in a process of its own."""
    rows = []
    for settings in CHECKED:
        config, method = small(*settings)
        calculated = run(Calculated(), config, 512, method, torch.float32)
        counts = [n["tuning"] - n["before tuning"] for n in (calculated, in_a_process("tuned", *settings))]
        row = dict(zip(("tuned", "optimizer", "checkpointing"), settings, strict=True))
        rows.append(row | dict(zip(("calculated", "measured"), counts, strict=True)))
        rows[-1]["measured / calculated"] = f"{counts[1] / counts[0]:.2f}"
        progress("check", rows)
    return [("Tuning a smaller UNet at 512 on the CPU in float32, without the weights", rows)]


def coded(memory: Memory, what: str, slices: int, size: int) -> dict[str, float]:
    """One picture through the autoencoder: bytes beyond the weights, and seconds (of computing,
    on the CPU)."""
    dtype = torch.float32 if memory.device == "cpu" else torch.bfloat16
    with torch.device(memory.device):
        model = Autoencoder().to(dtype).requires_grad_(False)
        model.slices = slices
        model.decoder.requires_grad_(what == "fit the decoder")

        def code(size: int) -> None:
            if what == "encode":
                model.encode(torch.zeros(1, 3, size, size, dtype=dtype))
            else:
                image = model.decode(torch.zeros(1, 4, size // 8, size // 8, dtype=dtype))
                if image.requires_grad:
                    image.float().square().mean().backward()

        if memory.device != "meta":
            code(64)  # libraries and kernels are loaded after this
        model.zero_grad()
        memory.reset()
        clock = time.process_time if memory.device == "cpu" else time.perf_counter
        before, start = memory.now(), clock()
        code(size)
        if memory.device == "cuda":
            torch.cuda.synchronize()
        return {"peak": memory.peak() - before, "seconds": clock() - start}


def sliced(what: str, slices: str, size: str) -> dict[str, float]:
    return coded(OnCuda() if torch.cuda.is_available() else OfProcess(), what, int(slices), int(size))


def slices() -> list[Table]:
    """The autoencoder of Stable Diffusion, whole and in strips."""
    rows = []
    for what, size, n in product(("encode", "decode", "fit the decoder"), (512, 768), (1, 4, 16)):
        memory = Calculated()
        with calculating(memory):
            row = {"what": what, "size": str(size), "slices": str(n)}
            row["calculated, bfloat16"] = coded(memory, what, n, size)["peak"]
        if torch.cuda.is_available() or (what != "fit the decoder" and size == 512):  # the others last too long
            measured = in_a_process("sliced", what, str(n), str(size))
            row[f"measured, {'bfloat16' if torch.cuda.is_available() else 'float32'}"] = measured["peak"]
            row["seconds"] = f"{measured['seconds']:.1f}"
        rows.append(row)
        progress("slices", rows)
    return [("Stable Diffusion's autoencoder, one picture, without the weights", rows)]


def in_a_process(job: str, *arguments: str) -> dict[str, float]:
    """What `job` of this file gives in a process that does nothing else, and returns freed memory to the system."""
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, job, *arguments]
    return json.loads(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout)


def progress(name: str, rows: list[dict]) -> None:
    print(f"{name}: {len(rows)}", file=sys.stderr, flush=True)


def markdown(title: str, rows: list[dict]) -> str:
    """Bytes become GB of 10^9."""
    head = list(dict.fromkeys(column for row in rows for column in row))
    lines = [[row.get(column, "") for column in head] for row in rows]
    cells = [[cell if isinstance(cell, str) else f"{cell / 1e9:.2f}" for cell in line] for line in lines]
    return f"## {title}, GB\n\n{table(head, cells)}"


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(torch.cuda.is_available())  # as edit.py does
    if sys.argv[1:2] in (["tuned"], ["sliced"]):
        print(json.dumps({"tuned": tuned, "sliced": sliced}[sys.argv[1]](*sys.argv[2:])))
        sys.exit()
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=["tables", "check", "slices"], help="tables, check, slices")
    for part in parser.parse_args().parts:
        found = {"tables": tables, "check": check, "slices": slices}[part]()
        cuda = torch.cuda.is_available()
        place = "no device" if part == "tables" and not cuda else machine(torch.device("cuda" if cuda else "cpu"))
        text = f"# Memory: {part}, {place}, torch {torch.__version__}\n\n" + "\n".join(markdown(*t) for t in found)
        print(text)
        keep(f"memory-{part}-{place.split(' (')[0]}", text, dict(found))
