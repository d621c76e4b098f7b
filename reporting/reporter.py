"""The reporter that `edit.py` hands to a method: progress bars, curves, timings, the tuning cache, and in the
end all files of one edit task, which appear together or not at all."""

import json
import re
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from metrics import Metrics, psnr
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from data.images import to_pil
from data.tasks import EditTask
from files import whole_file, whole_folder
from methods.base import EditResult, Reporter
from reporting.cache import TuningCache, code_fingerprint, digest
from reporting.logger import WandbLogger
from reporting.sheet import Cell, brief, contact_sheet, describe, scores

NO_COST = "reconstruction"  # the stage that shows how well the input is given back: no part of what an edit costs


class RunReporter(Reporter):
    """Reports one edit task into `folder`. `model` and `task` are what the method is given."""

    def __init__(
        self,
        folder: Path,
        model,
        task: EditTask,
        method: str,
        cache: TuningCache,
        logger: WandbLogger,
        kernels: Sequence[str | bool] = (),  # the settings that choose them: they round differently
        metrics: Metrics = Metrics(),
        fingerprint: str | None = None,  # the model's, where it is known already: for a large one it takes seconds
    ):
        self.folder, self.model, self.task, self.method = folder, model, task, method
        self.cache, self.logger, self.metrics = cache, logger, metrics
        self.prefix = "" if task.name == "edit" else f"{task.name}/"  # W&B keeps the tasks of a benchmark apart
        self.began, self.evaluations_before = time.perf_counter(), model.evaluations
        self.curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
        self.seconds: dict[str, float] = {}
        self.peak_memory: dict[str, int] = {}  # bytes
        # What is added to the seconds and evaluations of this run to give the edit's cost.
        self.elsewhere = {"seconds": 0.0, "evaluations": 0}
        self.reused: list[str] = []  # cached states that spared their tuning
        self.bar: tqdm | None = None
        self.identity = {}
        if cache.enabled:  # now, while the model is as it was loaded
            self.identity = {
                "model": fingerprint or model.fingerprint,
                "image": digest(task.image),
                "dtype": str(model.dtype),
                "device": model.device.type,
                "kernels": list(kernels),
                "code": code_fingerprint(),
                "torch": torch.__version__,
                "holds": "state and cost",
            }

    def progress(self, iterable: Iterable, stage: str, total: int | None = None) -> Iterator:
        interval = 0.1 if sys.stderr.isatty() else 10.0  # a log file wants few lines
        many = bool(self.prefix)  # the tasks have a bar of their own, which in a log file is enough
        bar = tqdm(
            iterable, stage, total, not many, sys.stderr, mininterval=interval, dynamic_ncols=True,
            disable=many and not sys.stderr.isatty(),
        )  # fmt: skip
        outer, self.bar = self.bar, bar
        try:
            yield from bar
        finally:
            bar.close()
            self.bar = outer

    def scalar(self, stage: str, step: int, **values: float) -> None:
        for name, value in values.items():
            self.curves.setdefault(stage, {}).setdefault(name, []).append((step, float(value)))
        if self.bar is not None:
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
        self.logger.scalars(self.prefix + stage, step, values)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        cuda = self.model.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.model.device)
            torch.cuda.reset_peak_memory_stats(self.model.device)
        start, before = time.perf_counter(), self.model.evaluations
        try:
            yield
        finally:
            if cuda:
                torch.cuda.synchronize(self.model.device)
            seconds = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            self.peak_memory[name] = max(self.peak_memory.get(name, 0), _peak_memory(self.model.device))
            if name == NO_COST:
                self.elsewhere["seconds"] -= seconds
                self.elsewhere["evaluations"] -= self.model.evaluations - before

    def cached(self, key: dict, build: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What tuning took is kept with the state, and is part of an edit's cost whether it was done now or before."""

        def measured() -> dict[str, Tensor]:
            start, before = time.perf_counter(), self.model.evaluations
            state = build()
            cost = [time.perf_counter() - start, self.model.evaluations - before, _peak_memory(self.model.device)]
            return state | {"cost": torch.tensor(cost, dtype=torch.float64)}

        start = time.perf_counter()
        state, found = self.cache.get(self.identity | {"key": key}, measured)
        seconds, evaluations, peak = state.pop("cost").tolist()
        self.elsewhere["seconds"] += seconds - (time.perf_counter() - start)  # keeping, waiting: no cost
        if found:
            stage = str(key.get("stage", "tuning"))
            self.reused.append(stage)
            self.elsewhere["evaluations"] += int(evaluations)
            self.peak_memory[stage] = int(peak)
        return state

    def finish(self, result: EditResult) -> list[str]:
        """Measure the edits, write and log everything; the lines that a person wants to read in the end."""
        peaks = [peak for name, peak in self.peak_memory.items() if name != NO_COST]
        cost = {
            "seconds": time.perf_counter() - self.began + self.elsewhere["seconds"],
            "evaluations": self.model.evaluations - self.evaluations_before + self.elsewhere["evaluations"],
            "peak_memory_gb": max(peaks, default=_peak_memory(self.model.device)) / 1e9,
        }
        with self.stage("metrics"):
            records, left_out = [], []
            for i, edit in enumerate(result.edits):
                measured, missing = self.metrics.measure(self.model, edit.image[None].to(self.task.image), self.task)
                left_out.append(missing)
                name = "_".join([f"{i:02d}", *(f"{k}-{brief(v)}" for k, v in edit.settings.items())])
                file = f"edits/{_plain(name)}.png"
                records.append({"file": file, "settings": edit.settings, "metrics": edit.metrics | measured})
            references = {"input": self.task.image} | ({} if self.task.truth is None else {"truth": self.task.truth})
            read = {name: self.metrics.read(self.model, picture, self.task) for name, picture in references.items()}
        numbers = {
            "method": self.method,
            "prompt": self.task.prompt,
            "source_prompt": self.task.source_prompt,
            **read,  # what CLIP makes of the input itself, and of the true result
            "reconstruction": {"psnr": psnr(result.reconstruction.cpu(), self.task.image[0].cpu())},
            "run": result.metrics,
            "edits": records,
            "left_out": left_out,  # for each edit
        }
        resources = {
            "cost": cost,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory,
            "device": _device_name(self.model.device),
            "reused_tuning": self.reused,
        }
        pictures = [to_pil(edit.image) for edit in result.edits]
        source, reconstruction = to_pil(self.task.image), to_pil(result.reconstruction)
        sheet = self._sheet(source, reconstruction, pictures, records, numbers)
        with whole_folder(self.folder) as folder:
            source.save(folder / "input.png")
            if self.task.truth is not None:
                to_pil(self.task.truth).save(folder / "truth.png")
            reconstruction.save(folder / "reconstruction.png")
            (folder / "edits").mkdir()
            for picture, record in zip(pictures, records, strict=True):
                picture.save(folder / record["file"])
            sheet.save(folder / "sheet.png")
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in result.tensors.items()}
            with whole_file(folder / "tensors.safetensors") as file:
                save_file(tensors, file)
            plots = self._plots(folder / "plots", records)
            (folder / "metrics.json").write_text(json.dumps(numbers, indent=2) + "\n")
            (folder / "timings.json").write_text(json.dumps(resources, indent=2) + "\n")
        captioned = [(p, describe(r["settings"])) for p, r in zip(pictures, records, strict=True)]
        shown = {"sheet": sheet, "input": source, "reconstruction": reconstruction, "edits": captioned}
        plotted = {f"plots/{name}": self.folder / "plots" / f"{name}.png" for name in plots}
        self.logger.pictures({self.prefix + name: picture for name, picture in (shown | plotted).items()})
        logged = {name: value for name, value in numbers.items() if name != "left_out"}
        self.logger.summary({self.prefix + name: value for name, value in _flat(logged | resources).items()})
        return self._headline(numbers)

    def _sheet(self, source, reconstruction, pictures, records, numbers):
        title = [f'{self.method}: "{self.task.prompt}"']
        if self.task.source_prompt:
            title.append(f'from: "{self.task.source_prompt}"')
        words = [f"CLIP {numbers['input']['clip_score']:.3f}"] if numbers["input"] else []
        references = [
            Cell(source, ["input", *words]),
            Cell(reconstruction, ["reconstruction", f"PSNR {numbers['reconstruction']['psnr']:.1f} dB"]),
        ]
        edits = [
            Cell(picture, [describe(record["settings"]), scores(record["metrics"])])
            for picture, record in zip(pictures, records, strict=True)
        ]
        return contact_sheet(title, references, edits)

    def _plots(self, folder: Path, records: list[dict]) -> list[str]:
        if not any(self.curves.values()) and len({record["settings"].get("eta") for record in records}) < 2:
            return []  # nothing to draw, and matplotlib takes a second to import
        from reporting.plots import plot_curves, plot_tradeoff

        folder.mkdir()
        if any(self.curves.values()):
            plot_curves(self.curves, folder / "loss.png")
        likeness = "clip_similarity_to_input" if self.model.clip is not None else "psnr_to_input"
        plot_tradeoff(records, "eta", ("clip_score", likeness), folder / "eta.png")
        return sorted(file.stem for file in folder.iterdir())

    def _headline(self, numbers: dict) -> list[str]:
        total, peak = time.perf_counter() - self.began, max(self.peak_memory.values())
        where = "GPU memory" if self.model.device.type == "cuda" else "memory"
        edits = numbers["edits"]
        count = f"{len(edits)} edit{'s' if len(edits) > 1 else ''}"
        reused = f" (from the cache: {', '.join(self.reused)})" if self.reused else ""
        lines = [
            f'{self.method}: {count} to "{self.task.prompt}"',
            f"{total:.1f} s{reused}, peak {where} {peak / 1e9:.2f} GB",
            f"reconstruction PSNR {numbers['reconstruction']['psnr']:.1f} dB",
        ]
        if "clip_score" in edits[0]["metrics"]:
            best = max(edits, key=lambda edit: edit["metrics"]["clip_score"])
            score, likeness = best["metrics"]["clip_score"], best["metrics"]["clip_similarity_to_input"]
            lines.append(
                f"best CLIP score {score:.3f} (the input has {numbers['input']['clip_score']:.3f}), "
                f"similarity to the input {likeness:.3f}: {best['file']}"
            )
        return [*lines, f"contact sheet: {self.folder / 'sheet.png'}"]


def _peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU since the last reset; on a CPU the most that the process took so far,
    other tasks and loading the model included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # Linux: getrusage gives there what the process that started this one took too
    peak = re.search(r"VmHWM:\s*(\d+) kB", status.read_text() if status.exists() else "")
    unit = 1 if sys.platform == "darwin" else 1024
    return int(peak[1]) * 1024 if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _plain(text: str) -> str:
    """`text` as a file name that needs no quoting in a shell or in Hydra's overrides."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in text)


def _flat(tree: dict | list, prefix: str = "") -> dict[str, float | str]:
    """{"a": {"b": 1}, "c": [2]} -> {"a/b": 1, "c/0": 2}."""
    items = enumerate(tree) if isinstance(tree, list) else tree.items()
    flat = {}
    for name, value in items:
        if isinstance(value, dict | list):
            flat |= _flat(value, f"{prefix}{name}/")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
