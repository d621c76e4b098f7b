"""The training loop: one for every part, on one process or many, resumable to the bit.

Step n depends only on (seed, n): its pictures, its noise and, unless `minutes` are set, its learning rate. So a state
is the weights, their average, the optimizer's state, n and the seconds spent, and a resumed run computes the steps of
an uninterrupted one. Each of W processes takes its slice of the same global batch, so any W computes the same steps.
"""

import copy
import itertools
import math
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from errors import InputError, check, check_number
from files import whole_file
from models.checkpoints import export_part


@dataclass
class Settings:
    """Settings of the loop; conf/part has the values of each part."""

    group = "training"  # its settings on the command line

    steps: int
    batch_size: int  # pictures per optimizer step, over all processes
    lr: float
    warmup: int  # steps over which the learning rate rises
    minutes: float | None = None  # of training, instead of `steps`
    min_lr: float = 0.02  # the cosine's floor, as a share of lr
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip_grad: float = 1.0
    ema_decay: float = 0.999
    compile: bool = False  # the trained network, by torch.compile
    workers: int = 0  # processes that draw pictures beside the training
    save_every: int = 250
    validate_every: int = 1000
    log_every: int = 20

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "save_every", "validate_every", "log_every")
        check(self, shares=("min_lr", "ema_decay"), counts=counts)
        check_number("training.workers", self.workers, whole=True, high=1024)
        check_number("training.clip_grad", self.clip_grad, low=1e-9)  # 0 would leave no gradient
        for beta in self.betas if len(self.betas) == 2 else [f"{self.betas}, not two"]:
            check_number("training.betas", beta, high=0.999999)

    def progress(self, step: int, seconds: float) -> float:
        """The share of the training that is done, in [0, 1], after `step` steps and `seconds`."""
        return min(1.0, step / self.steps if self.minutes is None else seconds / max(1e-9, 60 * self.minutes))

    def learning_rate(self, step: int, seconds: float) -> float:
        """A linear warm-up times half a cosine, which falls from 1 to `min_lr` with the progress."""
        cosine = 0.5 * (1 + math.cos(math.pi * self.progress(step, seconds)))
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup)) * (self.min_lr + (1 - self.min_lr) * cosine)


class Objective(nn.Module):
    """A loss of which only one part of a model learns, `trained`. A subclass has

    forward(batch)                the loss, and numbers to log
    draw(batch_size, generator)   a global batch's random numbers, on the generator's device, batch first
    validate(trained)             numbers, and pictures (3, H, W) in [-1, 1], of the averaged weights
    """

    def __init__(self, model: nn.Module, part: str, out: Path):
        super().__init__()
        self.model, self.part, self.out = model.requires_grad_(False), part, out
        self.trained = getattr(model, part).requires_grad_(True)

    def collate(self, items: Sequence[dict]) -> dict[str, Tensor]:
        """Items of the data set -> a batch on the CPU; called in a loader's process."""
        return {"image": torch.stack([i["image"] for i in items])}

    def export(self, trained: nn.Module) -> None:
        """Write the averaged weights to the folder `out`, where `models.load` finds them."""
        export_part(self.model, trained, self.out, self.part)


def train(
    objective: Objective, dataset: Dataset, settings: Settings, state_file: Path, device: torch.device, seed: int = 0,
    bfloat16: bool = False, log: Callable[[dict, dict, int], None] = lambda numbers, pictures, step: None,
) -> bool:  # fmt: skip
    """Train until `settings.steps` or `settings.minutes` are done; resume from `state_file` if it exists.

    Minutes are those of the clock, from the end of this process's first step on, so that compilation does not count.
    Returns False when a SIGTERM stopped it, and raises KeyboardInterrupt after a Ctrl-C, both after saving. Raises
    InputError if the batch cannot be split evenly, if the state is damaged or of another run, or if the loss, its
    gradient or a weight is no longer finite; the last good state stays.
    """
    s, distributed = settings, dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    if s.batch_size % world:
        raise InputError(f"batch_size={s.batch_size} is no multiple of {world} processes")
    objective.to(device)
    if device.type == "cuda":  # on a CPU, group normalisation is slow in this layout
        objective.to(memory_format=torch.channels_last)
    trained = objective.trained
    average = copy.deepcopy(trained).requires_grad_(False)
    matrices = {"params": [p for p in trained.parameters() if p.ndim > 1], "weight_decay": s.weight_decay}
    vectors = {"params": [p for p in trained.parameters() if p.ndim <= 1], "weight_decay": 0.0}  # biases and gains
    optimizer = torch.optim.AdamW([matrices, vectors], lr=s.lr, betas=tuple(s.betas), fused=True)
    stateful = {"trained": trained, "average": average, "optimizer": optimizer}
    identity = {"seed": seed, "batch_size": s.batch_size}
    step, seconds = restore(state_file, stateful, identity, device) if state_file.exists() else (0, 0.0)
    if s.compile:  # after the copy: the average stays as it is
        trained.compile()
    model = DistributedDataParallel(objective, broadcast_buffers=False) if distributed else objective
    own = s.batch_size // world  # this process's share of a batch
    starts = itertools.count(step * s.batch_size + rank * own, own * world)
    indices = (range(start, start + own) for start in starts)
    loading = {"collate_fn": objective.collate, "num_workers": s.workers, "pin_memory": device.type == "cuda"}
    batches = iter(DataLoader(dataset, batch_sampler=indices, worker_init_fn=leave_ctrl_c, **loading))
    clock = None  # the moment at which the training would have begun, had it never been interrupted
    stopped = []  # filled by a SIGTERM or Ctrl-C, which counts once

    def stop(number: int, _) -> None:
        stopped.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with ExitStack() as exits:
        for number in (signal.SIGTERM, signal.SIGINT):
            exits.callback(signal.signal, number, signal.signal(number, stop))
        done, total = step * s.batch_size, None if s.minutes else s.steps * s.batch_size
        bar = exits.enter_context(tqdm(initial=done, total=total, unit=" pictures", disable=rank > 0, mininterval=1))
        if device.type == "cpu":  # PyTorch's fused attention there is many times slower backwards than plain products
            exits.enter_context(sdpa_kernel([SDPBackend.MATH]))
        while s.progress(step, seconds) < 1:
            for group in optimizer.param_groups:
                group["lr"] = lr = s.learning_rate(step, seconds)
            generator = torch.Generator(device).manual_seed((seed * 1_000_003 + step) * 1_009)
            draws = objective.draw(s.batch_size, generator)
            batch = {k: v.to(device, non_blocking=True) for k, v in next(batches).items()}
            batch |= {k: v[rank * own : (rank + 1) * own] for k, v in draws.items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                loss, values = model(batch)
            loss.backward()
            numbers = {"loss": loss.detach()} | {name: value.detach() for name, value in values.items()}
            numbers["grad_norm"] = nn.utils.clip_grad_norm_(trained.parameters(), s.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            update_average(average, trained, step, s.ema_decay)
            step += 1
            bar.update(s.batch_size)

            if clock is None:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                clock = time.perf_counter() - seconds
            both = torch.tensor([time.perf_counter() - clock, len(stopped)], dtype=torch.float64)  # no device waits
            seconds, stopping = over_all(both, dist.ReduceOp.MAX)
            done = s.progress(step, seconds) == 1
            validating = done or step % s.validate_every == 0
            saving = validating or stopping or step % s.save_every == 0
            if saving or step % s.log_every == 0:
                means = torch.stack([value.float() for value in numbers.values()]) / world
                values = dict(zip(numbers, over_all(means, dist.ReduceOp.SUM), strict=True))
                weights = [*trained.parameters(), *average.parameters()] if saving else []
                peaks = torch.stack([means.sum(), *(w.detach().abs().max().half() for w in weights)])
                if not peaks.isfinite().all():  # in half precision, as they are exported; the last good state stays
                    raise InputError(f"loss, gradient or weights are not finite by step {step}: lower lr, raise warmup")
                bar.set_postfix_str(f"step {step}, loss {values['loss']:.4f}")
                log(values | {"lr": lr}, {}, step)
            if saving and rank == 0:
                with torch.no_grad():  # before the state, so that a kill in between is made up for
                    objective.export(average)
                    if validating:
                        log(*objective.validate(average), step)
                networks = {name: part.state_dict() for name, part in stateful.items()}
                with whole_file(state_file) as partial:
                    torch.save(networks | identity | {"step": step, "seconds": seconds}, partial)
            if saving and distributed:
                dist.barrier()
            if stopping and not done:
                if signal.SIGINT in stopped:
                    raise KeyboardInterrupt
                return False
    return True


def leave_ctrl_c(worker: int) -> None:
    """In a process that draws pictures: Ctrl-C is for the training, which needs the pictures up to its last step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@torch.no_grad()
def update_average(average: nn.Module, trained: nn.Module, step: int, decay: float) -> None:
    """average <- d average + (1 - d) trained, d = min(decay, (1 + step) / (10 + step)): the start is soon forgotten."""
    d = min(decay, (1 + step) / (10 + step))
    get_ema_multi_avg_fn(d)(list(average.parameters()), list(trained.parameters()), None)


def restore(file: Path, stateful: dict, identity: dict[str, int], device: torch.device) -> tuple[int, float]:
    """Read a state; return its step and seconds. Raises InputError for networks of other sizes, and for another seed or
    batch size, with which the data would not continue; steps, minutes and rates may differ."""
    try:
        stored = torch.load(file, map_location=device, weights_only=True)
        other = {name: stored[name] for name, value in identity.items() if stored[name] != value}
        for name, part in stateful.items():
            part.load_state_dict(stored[name])
    except Exception as error:  # a damaged file has many
        line = " ".join(str(error).split())[:200]
        raise InputError(f"{file} is damaged or of other sizes: choose another `out`, or delete it ({line})") from None
    if other:
        raise InputError(f"{file} was trained with {other}, which differ: choose another `out`")
    return stored["step"], stored["seconds"]


def over_all(values: Tensor, operation: dist.ReduceOp) -> list[float]:
    """Numbers, combined over all processes."""
    if dist.is_initialized():
        dist.all_reduce(values, operation)
    return values.tolist()
