"""The training loop: one for every part, on one process or many, resumable to the bit.

Nothing that a step needs lives outside its number: the pictures, the noise and the learning rate of step n follow
from (seed, n). So a checkpoint is the weights, their average, the optimiser's state and n; a resumed run continues
exactly where the uninterrupted one would be; and each of W processes takes its slice of the same global batch, so
that any number of processes computes the same steps.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from errors import InputError
from files import whole_file


@dataclass
class Settings:
    """What the loop needs to know. conf/part/ has the values for each part. Raises InputError for a count below 1."""

    steps: int
    batch_size: int  # pictures per optimiser step, over all processes
    lr: float
    warmup: int
    min_lr: float = 0.0  # the cosine's floor, as a share of lr
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip_grad: float = 1.0
    accumulate: int = 1  # micro-batches per optimiser step
    ema_decay: float = 0.999
    autocast: bool = False  # bfloat16
    seed: int = 0
    workers: int = 0
    save_every: int = 500
    validate_every: int = 1000
    log_every: int = 20

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "save_every", "validate_every", "log_every"):
            if not getattr(self, name) >= 1:
                raise InputError(f"part.training.{name}={getattr(self, name)}: it must be 1 or more")


class Objective(nn.Module):
    """What is trained, and how. `forward(batch)` gives the loss and numbers to log; only `trained` has gradients."""

    trained: nn.Module

    def collate(self, items: Sequence[dict]) -> dict:
        """Items of the dataset -> a batch of CPU tensors, in a loader's worker."""
        return {"image": torch.stack([i["image"] for i in items])}

    def draw(self, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The random numbers of one global micro-batch; each tensor's first axis is the batch."""
        return {}

    def validate(self, trained: nn.Module) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Numbers and picture grids (3, H, W) of the averaged weights."""
        return {}, {}

    def export(self, trained: nn.Module) -> None:
        """Write the averaged weights where `models.load` finds them."""


class BatchIndices:
    """The dataset indices of this process's micro-batches, from optimiser step `first` on."""

    def __init__(self, settings: Settings, first: int, rank: int, world: int):
        self.settings, self.first, self.rank, self.world = settings, first, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        s = self.settings
        micro = s.batch_size // s.accumulate
        own = micro // self.world
        for n in range(self.first * s.accumulate, s.steps * s.accumulate):
            start = n * micro + self.rank * own
            yield list(range(start, start + own))

    def __len__(self) -> int:
        return (self.settings.steps - self.first) * self.settings.accumulate


def learning_rate(step: int, s: Settings) -> float:
    """Linear warmup, then half a cosine down to `min_lr` of the peak at the last step."""
    if step < s.warmup:
        return s.lr * (step + 1) / s.warmup
    progress = (step - s.warmup) / max(1, s.steps - s.warmup)
    return s.lr * (s.min_lr + (1 - s.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def ema_update(decay: float):
    """Average with a decay that grows from 0.1 to `decay`, so that the first, random weights are soon forgotten."""

    def update(averages, values, count):
        weight = 1 - min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(list(averages), list(values), weight)

    return update


def train(
    objective: Objective,
    dataset: Dataset,
    settings: Settings,
    state_file: Path,
    device: torch.device,
    log=lambda numbers, pictures, step: None,
) -> bool:
    """Run the objective up to `settings.steps`; resume from `state_file` if it exists.

    Returns True when done, False when a SIGTERM stopped it, after saving. Raises InputError if the batch cannot be
    split evenly, if the state is of another run, or if the loss or its gradient is no longer finite (naming the step,
    with the last good state kept).
    """
    s = settings
    distributed = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    if s.batch_size % (world * s.accumulate):
        raise InputError(
            f"batch_size={s.batch_size} is no multiple of {world} processes x {s.accumulate} accumulation steps"
        )
    objective.to(device)
    trained = objective.trained.to(memory_format=torch.channels_last)
    ema = AveragedModel(trained, multi_avg_fn=ema_update(s.ema_decay), use_buffers=False)
    decay = [p for p in trained.parameters() if p.requires_grad and p.ndim > 1]
    no_decay = [p for p in trained.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": s.weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=s.lr, betas=tuple(s.betas), fused=True)

    first = 0
    if state_file.exists():
        first = restore(state_file, trained, ema, optimizer, s, device)
    model = DistributedDataParallel(objective) if distributed else objective
    loader = DataLoader(
        dataset,
        batch_sampler=BatchIndices(s, first, rank, world),
        collate_fn=objective.collate,
        num_workers=s.workers,
        persistent_workers=s.workers > 0,
        pin_memory=device.type == "cuda",
    )
    batches = iter(loader)

    stop = False

    def on_sigterm(signum, frame):
        nonlocal stop
        stop = True

    previous = signal.signal(signal.SIGTERM, on_sigterm)
    bar = tqdm(
        total=s.steps, initial=first, unit="step", disable=rank > 0, smoothing=0.05, file=sys.stderr, mininterval=1
    )
    window_start, window_step = time.perf_counter(), first
    try:
        objective.train()
        for step in range(first, s.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, s)
            numbers: dict[str, Tensor] = {}
            for micro in range(s.accumulate):
                batch = next(batches)
                batch.update(own_draws(objective, s, step, micro, rank, world))
                batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
                last = micro == s.accumulate - 1
                sync = nullcontext() if last or not distributed else model.no_sync()
                with sync:
                    with torch.autocast(device.type, torch.bfloat16, enabled=s.autocast):
                        loss, values = model(batch)
                    (loss / s.accumulate).backward()
                for name, value in {"loss": loss, **values}.items():
                    numbers[name] = numbers.get(name, 0) + value.detach() / s.accumulate
            norm = nn.utils.clip_grad_norm_(trained.parameters(), s.clip_grad)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update_parameters(trained)
            done = step + 1
            bar.update()

            stopping = agreed(stop, device) if distributed else stop
            due = done % s.validate_every == 0 or done == s.steps
            saving = stopping or due or done % s.save_every == 0
            if saving or done % s.log_every == 0:
                values = averaged(numbers, world) | {"grad_norm": norm.item(), "lr": learning_rate(step, s)}
                for name in ("loss", "grad_norm"):  # before anything is saved: the last good state stays
                    if not math.isfinite(values[name]):
                        raise InputError(f"{name} became {values[name]} by step {done}: lower lr or raise warmup")
                now = time.perf_counter()
                values["images_per_second"] = (done - window_step) * s.batch_size / (now - window_start)
                window_start, window_step = now, done
                bar.set_postfix_str(f"loss {values['loss']:.4f}, {values['images_per_second']:.0f} images/s")
                log(values, {}, done)
            if saving:
                if rank == 0:
                    store(state_file, trained, ema, optimizer, s, done)
                    if not stopping or done == s.steps:
                        publish(objective, ema.module, log, done, validate=due)
                if distributed:
                    dist.barrier()
                window_start, window_step = time.perf_counter(), done
            if stopping and done < s.steps:
                return False
        if first >= s.steps and rank == 0:  # a kill may have come between the last state and its publication
            publish(objective, ema.module, log, first, validate=True)
        return True
    finally:
        bar.close()
        signal.signal(signal.SIGTERM, previous)


@torch.no_grad()
def publish(objective: Objective, average: nn.Module, log, step: int, validate: bool) -> None:
    """Export the averaged weights, and judge them where that is due."""
    objective.export(average)
    if validate:
        objective.eval()
        log(*objective.validate(average), step)
        objective.train()


def averaged(numbers: dict[str, Tensor], world: int) -> dict[str, float]:
    """Means over all processes."""
    if world > 1:
        for value in numbers.values():
            dist.all_reduce(value)
    return {name: value.item() / world for name, value in numbers.items()}


def own_draws(objective: Objective, s: Settings, step: int, micro: int, rank: int, world: int) -> dict[str, Tensor]:
    """This process's slice of the global micro-batch's random numbers, which follow from (seed, step, micro)."""
    generator = torch.Generator().manual_seed((s.seed * 1_000_003 + step) * 1_009 + micro)
    size = s.batch_size // s.accumulate
    own = size // world
    return {k: v[rank * own : (rank + 1) * own] for k, v in objective.draw(size, generator).items()}


def agreed(stop: bool, device: torch.device) -> bool:
    """True on all processes as soon as it is True on one."""
    flag = torch.tensor(float(stop), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag.item())


def store(file: Path, trained: nn.Module, ema: AveragedModel, optimizer, s: Settings, step: int) -> None:
    """Write the state whole: a kill at any moment leaves the old state or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "step": step,
        "seed": s.seed,
        "batch_size": s.batch_size,
        "trained": trained.state_dict(),
        "ema": ema.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    with whole_file(file) as partial, open(partial, "wb") as stream:
        torch.save(state, stream)


def restore(file: Path, trained: nn.Module, ema: AveragedModel, optimizer, s: Settings, device) -> int:
    """Load the state; returns the step to go on from. `steps` and `lr` may differ from those it was saved with; with
    another seed or batch size the data would no longer continue, so they may not (InputError)."""
    state = torch.load(file, map_location=device, weights_only=True)
    for name in ("seed", "batch_size"):
        if state[name] != getattr(s, name):
            raise InputError(
                f"{file} was trained with {name}={state[name]}, not {getattr(s, name)}: "
                "continue with the same, or choose another `out`"
            )
    try:
        trained.load_state_dict(state["trained"])
    except RuntimeError:
        raise InputError(f"{file} holds networks of other sizes: choose another `out`, or delete it") from None
    ema.load_state_dict(state["ema"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]
