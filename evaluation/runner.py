"""Edit tasks with one method, and write a row for each edit as soon as its task is done.

A run that stopped goes on by skipping the tasks whose rows are there. Processes that share a run's tasks have a file of
rows each. One picture is a run of one task, which is edited anew each time.
"""

import errno
import json
import math
import os
import re
import resource
import shutil
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from data.images import to_pil
from data.tasks import EditTask, Entry, Tasks
from errors import InputError
from evaluation import report
from evaluation.cache import TuningCache, digest, on_cpu
from evaluation.cli import explain, overrides, provenance
from evaluation.config import choices
from evaluation.metrics import Metrics, psnr
from evaluation.wandb_log import WandbLogger
from files import CLONE, whole_file
from methods.base import RECONSTRUCTION, Method, Run, cosine, perform

# Of a run or a task, as far as the next attempt does not write them again.
OUTPUTS = ("truth.png", "reconstruction.png", "edits", "plots", "error.txt", "results.csv", "sheet.png", "rows.jsonl")
# Settings that change no result, or choose tasks only: a folder may be continued with others.
NOT_COMPARED = re.compile(r"(logger|cache|device|objective|model\.weights|task\.(categories|limit|shard))(\.|$)")


class TaskRun(Run):
    """The run of one task: shows progress, collects curves, caches tuned states, and knows what it costs."""

    def __init__(self, editor: "Editor", image: Tensor, seed: int, alone: bool = True):
        super().__init__(seed)
        self.model, self.cache, self.logger = editor.model, editor.cache, editor.logger
        self.identity = editor.identity | {"image": digest(image)}
        self.alone = alone  # else the tasks have a bar of their own
        self.curves: dict[str, dict[str, list[float]]] = {}
        self.bar: tqdm | None = None
        self.offset, self.peak = np.zeros(2), 0.0  # the costs of cached tunings; memory in 10^9 bytes
        if self.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.model.device)

    def progress(self, stage: str) -> Callable[[Iterable], Iterator]:
        def bars(iterable: Iterable) -> Iterator:
            with progress_bar(iterable, stage, disable=not self.alone) as self.bar:
                yield from self.bar

        return bars

    def scalar(self, stage: str, step: int, **values: float) -> None:
        for name, value in values.items():
            self.curves.setdefault(stage, {}).setdefault(name, []).append(float(value))
        if self.bar is not None:
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
        if self.alone:
            self.logger.scalars(stage, step, values)

    def cached(self, stage: str, key: dict, build: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """An entry holds its own cost, so that an edit costs its tuning wherever that was done."""
        if not self.cache.enabled:
            return on_cpu(build())
        start = self.cost()

        def measured() -> tuple[dict[str, Tensor], dict]:
            before, tensors = self.cost(), build()
            return tensors, {"cost": list(self.cost() - before), "peak": peak_memory(self.model.device)}

        tensors, notes = self.cache.get(self.identity | {"stage": stage, "key": key}, measured)
        self.offset = self.offset + start + notes["cost"] - self.cost()  # reading, writing and waiting cost nothing
        self.peak = max(self.peak, notes["peak"])
        return tensors

    def cost(self) -> np.ndarray:
        """Seconds and evaluations, when all work so far is done."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return self.offset + (perf_counter(), self.model.evaluations)


@dataclass
class Editor:
    """All that the tasks of a run have in common."""

    model: torch.nn.Module
    method: Method
    name: str  # the method's, as it was chosen
    metrics: Metrics
    cache: TuningCache
    logger: WandbLogger
    kernels: Sequence[str | bool] = ()  # settings that choose them: they round differently
    fingerprint: str | None = None  # the model's

    def __post_init__(self) -> None:
        device, code = self.model.device, digest(*(file.read_bytes() for file in code_of(self.method)))
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self.identity = {"model": self.fingerprint, "dtype": str(self.model.dtype), "device": card, "code": code}
        self.identity |= {"kernels": list(self.kernels), "torch": torch.__version__}

    def edit_task(self, task: EditTask, place: Path, seed: int, alone: bool = True) -> tuple[list[dict], dict]:
        """Edit one task and write its files to `place`. Returns a row for each edit, with a path for each file, and the
        curves of its stages, {stage: {name: one value for each step}}. An edit's seconds and evaluations are those of
        the task from its beginning to this edit: tuning included, cached or not, and the reconstruction left out.
        Raises InputError where a result is not finite, or there is none."""
        torch.manual_seed(seed)  # methods draw from generators of their own; this is for those that do not
        run, results, reconstruction = TaskRun(self, task.image, seed, alone), [], None
        before, cost = run.cost(), np.zeros(2)
        for settings, latent, picture in perform(self.method, self.model, task, run):
            if settings == RECONSTRUCTION:
                reconstruction = picture
            else:
                cost = cost + run.cost() - before
                spent = {"seconds": cost[0], "evaluations": int(cost[1])}
                spent["peak_memory_gb"] = max(run.peak, peak_memory(self.model.device))
                results.append((settings, latent, picture, run.metrics | spent))
            before = run.cost()
        if not results:
            raise InputError(f"method={self.name} gave no edit")

        shown = {"input": task.image, "reconstruction": reconstruction, "truth": task.truth}
        files = {place / f"{name}.png": picture for name, picture in shown.items() if picture is not None}
        of_all = {"method": self.name, "seed": seed} | {path.stem: path for path in files}
        known = {} if reconstruction is None else {"reconstruction_psnr": psnr(reconstruction[None], task.image.cpu())}
        rows = []
        for settings, latent, picture, numbers in results:
            numbers = numbers | self.metrics.measure(self.model, picture[None].to(task.image), task) | known
            numbers["edit_source_cosine"] = cosine(latent, run.tensors["source_latent"])
            words = [f"{len(rows):02d}", *(f"{name}-{report.short(value)}" for name, value in settings.items())]
            file = place / "edits" / (re.sub(r"[^\w.-]", "-", "_".join(words)) + ".png")  # needs no quotes in a shell
            row = of_all | {"sample": settings.get("sample", 0), "file": file}
            row |= {f"edit.{name}": value for name, value in settings.items() if name != "sample"}
            rows.append(row | {name: value for name, value in numbers.items() if math.isfinite(value)})
            files[file] = picture

        (place / "edits").mkdir(parents=True, exist_ok=True)
        for path, picture in files.items():
            to_pil(picture).save(path)
        latents = torch.cat([latent for _, latent, *_ in results])
        save_file(on_cpu(run.tensors | {"edited_latents": latents}), place / "tensors.safetensors")
        return rows, run.curves


def edit_all(source: Tasks, folder: Path, edit: Callable, seed: int, settings: dict) -> list[dict]:
    """Edit this process's share of the tasks that are not done yet, report on the folder, and return all its rows.
    `edit` (task, its folder, its seed) gives the rows and the curves of one. A task that fails leaves a row with
    `error`; the next run tries it again. One picture is edited anew, and its errors are raised. Raises InputError where
    the folder holds results of other settings."""
    folder.mkdir(parents=True, exist_ok=True)
    used, typed = (folder / "run.json").exists(), overrides()
    about = {entry.name: marks(entry) for entry in source.entries}
    done = set() if source.single else {row["task"] for row in rows_of(about, folder) if "error" not in row}
    waiting = [entry for entry in source.share if entry.name not in done]
    root = folder.resolve()
    for path in (path.resolve() for entry in waiting for path in (entry.image, entry.mask, entry.truth) if path):
        if path.is_relative_to(root) and {"input.png", *OUTPUTS} & {*path.relative_to(root).parts[: 2 - source.single]}:
            raise InputError(f"{path} would be removed or written over: choose another hydra.run.dir")
    claim(folder, settings, source.single)
    mine = folder / "rows.jsonl"
    if source.share and len(source.share) < len(source.entries):
        mine = folder / f"rows-{source.entries.index(source.share[0])}.jsonl"
    curves, total = {}, len(source.share)
    bar = progress_bar(desc="tasks", total=total, initial=total - len(waiting), disable=source.single)
    try:
        for entry in waiting:
            place, own_seed = (folder, seed) if source.single else (folder / entry.name, task_seed(seed, entry.name))
            place.mkdir(exist_ok=True)
            for old in (place / name for name in OUTPUTS if used):  # of an earlier run, or of an attempt that failed
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink(missing_ok=True)
            try:
                rows, curves = edit(entry, place, own_seed)
            except Exception as error:
                if source.single:
                    raise
                line = explain(error) or repr(error)
                (place / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
                bar.write(f"{entry.name} failed: {line}", file=sys.stderr)
                rows = [{"error": line}]
            append(mine, [typed | about[entry.name] | row for row in rows])
            bar.update()
    finally:
        bar.close()
        rows = rows_of(about, folder)
        if rows:
            print(report.write(folder, pd.DataFrame(rows), len(source.entries), curves if source.single else None))
            if len({row["task"] for row in rows if "error" not in row}) < len(source.entries):
                print(f"the same command goes on from here with hydra.run.dir={folder} (a sweep: with hydra.sweep.dir)")
    return rows


def append(file: Path, rows: Sequence[dict]) -> None:
    """Write the rows of one task at once, so that a process that is killed leaves all of them or none."""
    encode = lambda row: json.dumps(row, default=lambda path: path.relative_to(file.parent).as_posix()) + "\n"
    with file.open("a+b", buffering=0) as out:
        out.seek(max(0, (size := out.seek(0, os.SEEK_END)) - 1))
        cut = out.read(1) not in (b"", b"\n")  # an earlier process left half a line
        data = ("\n" * cut + "".join(map(encode, rows))).encode()
        if out.write(data) < len(data):
            out.truncate(size)
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        os.fsync(out.fileno())


def rows_of(about: dict[str, dict], folder: Path) -> list[dict]:
    """The rows of all processes, in the order of the tasks, without those of tasks that have changed."""
    order = {report.task_of(marks): i for i, marks in enumerate(about.values())}
    rows = [row for row in report.run_rows(folder) if report.task_of(row) in order]
    return sorted(rows, key=lambda row: order[report.task_of(row)])


def marks(entry: Entry) -> dict[str, str]:
    """The part of a row that says which task it is: its name, its texts, and its pictures with a hash of each."""
    paths = filter(None, (entry.image, entry.mask, entry.truth))
    pictures = ", ".join(f"{path.name} {digest(path.read_bytes())[:12]}" for path in paths)
    texts = {name: getattr(entry, name) for name in report.MARKS if hasattr(entry, name)}
    return {"task": entry.name, "pictures": pictures} | texts


def claim(folder: Path, settings: dict, anew: bool) -> None:
    """Write down a folder's settings. Raises InputError where its results have others; with `anew`, where a list's."""
    path, theirs = folder / "run.json", {}
    ours = pd.json_normalize(settings).to_dict("records")[0]  # {"a.b": 1} of {"a": {"b": 1}}
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):  # there is none, or it is damaged
        theirs = {**json.loads(path.read_text(encoding="utf-8"))["settings"]}
    if theirs and any(folder.glob("rows*.jsonl")):
        names = ["task._target_"] if anew else {**theirs, **ours}
        if names := [name for name in names if theirs.get(name) != ours.get(name) and not NOT_COMPARED.match(name)]:
            changes = "; ".join(f"{name} was {theirs.get(name)}, is {ours.get(name)}" for name in names[:3])
            raise InputError(f"{folder} holds results of other settings ({changes}): choose another hydra.run.dir")
    with whole_file(path) as partial:
        partial.write_text(json.dumps(provenance() | {"settings": ours}, indent=1) + "\n", encoding="utf-8")


def task_seed(seed: int, name: str) -> int:
    """A task's own seed, from the run's and its name; seed= edits that picture alone alike."""
    return int(digest(f"{seed}/{name}")[:8], 16) >> 1


def objective(setting: str | Sequence[str] | None, rows: Sequence[dict]) -> float | list[float] | None:
    """The mean over edits of each metric that `objective=` names: a number for one, a list for several, None for none.
    Raises InputError where no edit has it, or tasks failed."""
    names = [setting] if isinstance(setting, str | int | float) else list(setting or [])
    if names and any("error" in row for row in rows):
        raise InputError("objective: tasks failed, so the rest does not compare with other settings")
    means = pd.DataFrame(rows).reindex(columns=names).apply(pd.to_numeric, errors="coerce").mean().tolist()
    if any(map(math.isnan, means)):
        raise InputError(f"objective={setting}: no edit has this metric; evaluation/metrics.py says what it needs")
    return means if len(names) > 1 else next(iter(means), None)


def progress_bar(*args, **kwargs) -> tqdm:
    """A bar on stderr; in a log file a line every ten seconds."""
    return tqdm(*args, **kwargs, mininterval=0.1 if sys.stderr.isatty() else 10, dynamic_ncols=True)


def peak_memory(device: torch.device) -> float:
    """In 10^9 bytes: what tensors took at most on the GPU since the task began; on a CPU what the process took at most
    since its own beginning, loading the model and earlier tasks included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def code_of(method: Method) -> list[Path]:
    """The files whose code a tuning runs: samplers, networks, and methods/ without the files of other methods."""
    own = {kind.__module__ for part in (method, *vars(method).values()) for kind in type(part).__mro__}
    others = {choice.target.rpartition(".")[0] for choice in choices()} - own
    files = [file for room in ("methods", "samplers", "models") for file in sorted((CLONE / room).glob("*.py"))]
    return [file for file in files if f"{file.parent.name}.{file.stem}" not in others]
