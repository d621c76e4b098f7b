"""Edit tasks with one method, and write a row for each edit as soon as its task is done.

A run that stopped goes on by skipping the tasks whose rows are there. Processes that share a run's tasks have a file of
rows each. One picture is a run of one task, which is edited anew each time.
"""

import hashlib
import inspect
import json
import math
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from data.images import to_pil
from data.tasks import EditTask, Entry, Tasks
from errors import InputError
from evaluation import report
from evaluation.cache import TuningCache, code_fingerprint, digest
from evaluation.cli import explain, one_line, overrides
from evaluation.metrics import Metrics, psnr
from evaluation.wandb_log import WandbLogger
from files import whole_file
from methods.base import RECONSTRUCTION, Method, Run, cosine, perform, source_latent

OUTPUTS = ("input.png", "truth.png", "reconstruction.png", "edits", "tensors.safetensors", "plots", "error.txt")
SAME_ERRORS = 3  # in a row end a run
# Settings that change no result, or choose tasks only: a folder may be continued with others.
NOT_COMPARED = (
    "logger.", "cache.", "device.", "objective.", "model.weights.", "task.categories.", "task.limit.", "task.shard.",
)  # fmt: skip


class Counted:
    """A view of a model that counts the evaluations of its network, one for each latent in a batch."""

    def __init__(self, model):
        self.model, self.evaluations = model, 0

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def predict(self, x: Tensor, t: Tensor | int, conditioning) -> Tensor:
        self.evaluations += len(x)
        return self.model.predict(x, t, conditioning)


class TaskRun(Run):
    """The run of one task: shows progress, collects curves, caches tuned states, and knows what it costs."""

    def __init__(
        self,
        model: Counted,
        seed: int,
        cache: TuningCache,
        identity: dict,  # all but a stage's key on which tuned states depend
        logger: WandbLogger,
        alone: bool = True,  # else the tasks have a bar of their own, which is enough for a log file
    ):
        super().__init__(seed)
        self.model, self.cache, self.identity, self.logger, self.alone = model, cache, identity, logger, alone
        self.curves: dict[str, dict[str, list[float]]] = {}
        # What to add to the time and the evaluations of this process: cached tuning, less the reconstruction.
        self.more_seconds, self.more_evaluations, self.cached_peak = 0.0, 0, 0.0
        self.bar: tqdm | None = None
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(model.device)
        self.began = self.now()

    def progress(self, stage: str) -> Callable[[Iterable], Iterator]:
        def bars(iterable: Iterable) -> Iterator:
            silent = not self.alone and not sys.stderr.isatty()
            with progress_bar(iterable, stage, leave=self.alone, disable=silent) as bar:
                outer, self.bar = self.bar, bar
                yield from bar
                self.bar = outer

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

        def measured() -> tuple[dict[str, Tensor], dict]:
            start, evaluations = self.now(), self.model.evaluations
            tensors = build()
            cost = {"seconds": self.now() - start, "evaluations": self.model.evaluations - evaluations}
            return tensors, cost | {"peak_memory_gb": peak_memory(self.model.device)}

        start, evaluations = self.now(), self.model.evaluations
        tensors, cost, found = self.cache.get(self.identity | {"stage": stage, "key": key}, measured)
        self.more_seconds += cost["seconds"] - (self.now() - start)  # reading, writing and waiting cost nothing
        self.more_evaluations += cost["evaluations"] - (self.model.evaluations - evaluations)
        self.cached_peak = max(self.cached_peak, cost["peak_memory_gb"])
        if found and self.alone:
            tqdm.write(f"{stage}: from the cache", file=sys.stderr)
        return tensors

    def now(self) -> float:
        """Seconds, when all work so far is done."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()

    def cost(self) -> dict[str, float]:
        return {
            "seconds": self.now() - self.began + self.more_seconds,
            "evaluations": self.model.evaluations + self.more_evaluations,
            "peak_memory_gb": max(self.cached_peak, peak_memory(self.model.device)),
        }


@dataclass
class Editor:
    """What all tasks of a run have in common."""

    model: torch.nn.Module
    method: Method
    name: str  # the method's, as it was chosen
    metrics: Metrics
    cache: TuningCache
    logger: WandbLogger
    kernels: Sequence[str | bool] = ()  # settings that choose them: they round differently
    fingerprint: str | None = None  # the model's

    def __post_init__(self) -> None:
        self.identity = {
            "model": self.fingerprint,
            "dtype": str(self.model.dtype),
            "device": device_name(self.model.device),
            "kernels": list(self.kernels),
            "torch": torch.__version__,
            "code": code_fingerprint(files_of(self.method)),
        }

    def edit_task(self, task: EditTask, place: Path, seed: int, alone: bool = True) -> tuple[list[dict], dict]:
        """Edit one task and write its files to `place`. Returns a row for each edit, with files relative to `place`,
        and the curves of its stages, {stage: {name: one value for each step}}.

        An edit's seconds and evaluations are those from the encoding of the picture to its decoding: tuning included,
        cached or not, and the reconstruction left out. Raises InputError where a result is not finite.
        """
        torch.manual_seed(seed)  # methods draw from generators of their own; this is for those that do not
        identity = self.identity | {"image": digest(task.image)}
        run = TaskRun(Counted(self.model), seed, self.cache, identity, self.logger, alone)
        results, latents, pictures, reconstruction, before = [], [], [], None, run.cost()
        for settings, latent, picture in perform(self.method, run.model, task, run):
            cost = run.cost()
            if settings == RECONSTRUCTION:
                reconstruction = picture
                run.more_seconds -= cost["seconds"] - before["seconds"]
                run.more_evaluations -= cost["evaluations"] - before["evaluations"]
            else:
                results.append((settings, dict(run.metrics), cost))
                latents.append(latent)
                pictures.append(picture)
            before = run.cost()

        with torch.no_grad():
            source = source_latent(self.model, task.image)
        of_all = {"task": task.name, "category": task.category, "method": self.name, "seed": seed}
        of_all |= {"prompt": task.prompt, "source_prompt": task.source_prompt}
        known = {f"input_{name}": n for name, n in self.metrics.read(self.model, task.image, task).items()}
        if task.truth is not None:
            known |= {f"truth_{name}": n for name, n in self.metrics.read(self.model, task.truth, task).items()}
        if reconstruction is not None:
            known["reconstruction_psnr"] = float(psnr(reconstruction[None].to(task.image), task.image))
        shown = {"input": task.image, "reconstruction": reconstruction, "truth": task.truth}
        shown = {f"{name}.png": picture for name, picture in shown.items() if picture is not None}
        of_all |= {name.removesuffix(".png"): name for name in shown}
        rows = []
        for (settings, metrics, cost), latent, picture in zip(results, latents, pictures, strict=True):
            measured, left_out = self.metrics.measure(self.model, picture[None].to(task.image), task)
            numbers = run.metrics | metrics | {"edit_source_cosine": cosine(latent, source)} | measured | known | cost
            left_out |= {name: f"it is {value}" for name, value in numbers.items() if not math.isfinite(value)}
            name = "_".join([f"{len(rows):02d}", *(f"{name}-{short(value)}" for name, value in settings.items())])
            row = of_all | {"sample": settings.get("sample", 0), "file": f"edits/{name}.png", "left_out": left_out}
            row |= {f"edit.{name}": value for name, value in settings.items() if name != "sample"}
            rows.append(row | {name: value for name, value in numbers.items() if math.isfinite(value)})
            shown[row["file"]] = picture
        tensors = run.tensors | {"source_latent": source, "edited_latents": torch.cat(latents)}
        with whole_outputs(place) as folder:
            (folder / "edits").mkdir()
            for name, picture in shown.items():
                to_pil(picture).save(folder / name)
            save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, folder / "tensors.safetensors")
        return rows, run.curves


def edit_all(
    source: Tasks,
    folder: Path,
    edit: Callable[[Entry, Path, int], tuple[list[dict], dict]],  # (task, its folder, its seed) -> rows, curves
    seed: int,
    settings: dict,
    wanted: Sequence[str] = (),  # metrics that a sweeper optimises
) -> list[dict]:
    """Edit this process's share of the tasks that are not done yet, report on the folder, and return all its rows.

    A task that fails leaves a row with `error`; the next run tries it again, after those never tried. Raises InputError
    where the folder holds results of other settings, where several tasks in a row fail with the same error, and for a
    wanted metric that does not exist. For one picture errors are raised, and rows of an earlier run are replaced.
    """
    single, rank = source.single, int(os.environ.get("RANK", 0))
    folder.mkdir(parents=True, exist_ok=True)
    if not single:
        claim(folder, settings)
    typed, before = overrides(), [] if single else rows_of(source, folder)
    done, tried = {row["task"] for row in before if "error" not in row}, {row["task"] for row in before}
    waiting = sorted((e for e in source.share if e.name not in done), key=lambda entry: entry.name in tried)
    mine = folder / "rows.jsonl"
    if source.share and len(source.share) < len(source.entries):
        mine = folder / f"rows-{source.entries.index(source.share[0])}.jsonl"
    curves, same, last = {}, 0, ""
    bar = progress_bar(desc="tasks", total=len(source.share), initial=len(source.share) - len(waiting), disable=single)
    try:
        for entry in waiting:
            place, own_seed = (folder, seed) if single else (folder / entry.name, task_seed(seed, entry.name))
            try:
                rows, curves = edit(entry, place, own_seed)
                same = 0
            except Exception as error:
                if single:
                    raise
                line = explain(error) or one_line(error)
                place.mkdir(exist_ok=True)
                (place / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
                bar.write(f"{entry.name} failed: {line}", file=sys.stderr)
                rows, same, last = [{"task": entry.name, "error": line}], same + 1 if line == last else 1, line
            if not single:
                rows = [{k: f"{entry.name}/{v}" if k in report.FILES else v for k, v in row.items()} for row in rows]
            with mine.open("w" if single else "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(typed | marks(entry) | row) + "\n" for row in rows))
            bar.update()
            check_objective(wanted, rows)
            if same == SAME_ERRORS:
                raise InputError(f"{same} tasks in a row failed alike, so the run ends: {last}")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            wait_for_all()
    finally:
        bar.close()
        rows = rows_of(source, folder)
        if rows and rank == 0:
            import pandas as pd  # slow to import

            print(report.write(folder, pd.DataFrame(rows), len(source.entries), curves if single else None))
            if {row["task"] for row in rows if "error" not in row} < {entry.name for entry in source.entries}:
                sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
                place = f"hydra.sweep.dir={HydraConfig.get().sweep.dir}" if sweep else f"hydra.run.dir={folder}"
                print(f"the same command goes on from here with {place}")
    return rows


def rows_of(source: Tasks, folder: Path) -> list[dict]:
    """The rows of all processes, in the order of the tasks. Failures of tasks that are done by now are left out, and so
    are rows of tasks that have changed: names may be line numbers."""
    groups: dict[str, list[dict]] = {}
    for file in sorted(folder.glob("rows*.jsonl")):
        for row in report.json_lines(file):
            groups.setdefault(row.get("task", ""), []).append(row)
    rows = []
    for entry in source.entries:
        group = [row for row in groups.get(entry.name, []) if row.items() >= marks(entry).items()]
        rows += [row for row in group if "error" not in row] or group[-1:]
    return rows


def marks(entry: Entry) -> dict[str, str]:
    """By which a row's task is known again, beside its name."""
    pictures = ", ".join(str(path) for path in (entry.image, entry.mask, entry.truth) if path)
    own = {"category": entry.category, "prompt": entry.prompt, "source_prompt": entry.source_prompt}
    return own | ({"pictures": pictures} if pictures else {})


def claim(folder: Path, settings: dict) -> None:
    """Write down the settings of a folder's results. Raises InputError where it holds results of others."""
    path, ours = folder / "settings.json", flat(json.loads(json.dumps(settings)))
    ours = {name: value for name, value in ours.items() if not f"{name}.".startswith(NOT_COMPARED)}
    if path.exists() and any(folder.glob("rows*.jsonl")):
        theirs = json.loads(path.read_text(encoding="utf-8"))
        names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
        if names:
            changes = "; ".join(f"{name} was {theirs.get(name)}, is {ours.get(name)}" for name in names[:3])
            raise InputError(f"{folder} holds results of other settings ({changes}): choose another hydra.run.dir")
    with whole_file(path) as partial:
        partial.write_text(json.dumps(ours, indent=1) + "\n", encoding="utf-8")


def flat(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    items = {}
    for name, value in tree.items():
        items |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return items


def task_seed(seed: int, name: str) -> int:
    """A task's own seed, from the run's and its name; seed= edits that picture alone alike."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big") >> 1


def names(objective: str | Sequence[str] | None) -> list[str]:
    """The metrics that the setting `objective` names, none for null. Raises InputError for another kind of value."""
    if objective is None:
        return []
    metrics = [objective] if isinstance(objective, str) or not isinstance(objective, Sequence) else list(objective)
    if not metrics or not all(isinstance(name, str) and name for name in metrics):
        raise InputError(f"objective={objective}: name a metric, or a list such as [success,psnr_to_input_kept]")
    return metrics


def check_objective(wanted: Sequence[str], rows: Sequence[dict]) -> None:
    """Raise InputError for a metric that no edit can have, as soon as one task is measured."""
    for name in wanted:
        if not any(name in row or name in row.get("left_out", ()) or "error" in row for row in rows):
            numbers = sorted({key for row in rows for key, value in row.items() if isinstance(value, int | float)})
            raise InputError(f"objective={name} is unknown: choose from {', '.join(numbers)}")


def objective(wanted: Sequence[str], rows: Sequence[dict]) -> float | list[float] | None:
    """The mean of each wanted metric over the edits that have it: a number for one, a list for several, None for none.
    Raises InputError where tasks failed, since the rest would not compare with other settings, or no edit has it."""
    failed = {row["task"] for row in rows if "error" in row}
    if wanted and failed:
        raise InputError(f"objective: {len(failed)} tasks failed, so the rest does not compare with other settings")
    means = []
    for name in wanted:
        values = [row[name] for row in rows if name in row]
        if not values:
            why = next((row["left_out"][name] for row in rows if name in row["left_out"]), "no edit has it")
            raise InputError(f"objective={name} cannot be computed: {why}")
        means.append(sum(values) / len(values))
    return means if len(means) > 1 else means[0] if means else None


@contextmanager
def whole_outputs(place: Path) -> Iterator[Path]:
    """An empty folder whose entries replace the outputs in `place` when the block ends well. Outputs of an earlier run
    that this one lacks are removed. If the block raises, `place` stays as it was."""
    place.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".partial-", dir=place))
    try:
        yield folder
        old = folder / ".old"
        old.mkdir()
        for name in OUTPUTS:
            if (place / name).exists():
                os.replace(place / name, old / name)
            if (folder / name).exists():
                os.replace(folder / name, place / name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_all() -> None:
    """Return when every process of torchrun has come here, so that the first of them reports on all."""
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(days=30))
    dist.barrier()
    dist.destroy_process_group()


def progress_bar(*args, **kwargs) -> tqdm:
    """A bar on stderr; in a log file a line every ten seconds."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(*args, **kwargs, file=sys.stderr, mininterval=interval, dynamic_ncols=True)


def peak_memory(device: torch.device) -> float:
    """In 10^9 bytes: what tensors took at most on the GPU since the task began; on a CPU what the process took at most
    since its own beginning, loading the model and earlier tasks included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def files_of(method: Method) -> set[Path]:
    """The files of methods/ that a method and its parts are written in, with those that they import."""
    names = [kind.__module__ for part in (method, *vars(method).values()) for kind in type(part).__mro__]
    files: set[Path] = set()
    while names:
        module = sys.modules.get(names.pop())
        if module is not None and module.__name__.startswith("methods.") and Path(module.__file__) not in files:
            files.add(Path(module.__file__))
            used = vars(module).values()
            names += [thing.__name__ if inspect.ismodule(thing) else getattr(thing, "__module__", "") for thing in used]
    return files


def short(value: float | int | str) -> str:
    """A setting as a part of a file's name that needs no quotes in a shell."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in text)
