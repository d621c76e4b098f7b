"""Edit one image, or every task of a benchmark, with one method. Wiring only; see conf/edit.yaml.

python edit.py method=imagic image=dog.jpg prompt="a sitting dog"
"""

import os
import warnings
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from errors import InputError
from reporting import outcome


@hydra.main(version_base="1.3", config_path="conf", config_name="edit")
def main(cfg: DictConfig) -> float | list[float] | None:
    with outcome.job():
        hydra_config = HydraConfig.get()
        shared = int(os.environ.get("WORLD_SIZE", 1)) > 1
        if shared and hydra_config.mode == RunMode.MULTIRUN:
            outcome.end("error: torchrun shares the tasks of one run: start a sweep, --multirun, without it", 1)
        if shared and not any("hydra.run.dir=" in given for given in hydra_config.overrides.hydra):
            raise InputError("the processes of torchrun must share a folder: name it, for example hydra.run.dir=runs/a")
        value, failed = edit(cfg, Path(hydra_config.runtime.output_dir), hydra_config.runtime.choices.method)
        # A sweep says so in its own end, and torchrun would stop the other processes.
        if failed and hydra_config.mode == RunMode.RUN and not shared:
            outcome.end(f"error: {failed} tasks failed: results.csv and their error.txt say why", 1)
        return value


def edit(cfg: DictConfig, folder: Path, method_name: str) -> tuple[float | list[float] | None, int]:
    """One run: what it comes to for a sweeper that optimises (see reporting/objective.py), and how many of its tasks
    failed. What the user can get wrong is constructed, and so checked, before the work begins."""
    import torch
    from hydra.utils import instantiate

    import models
    from data.images import check_size, find
    from data.tasks import Entry
    from models.attention import why_not_fused
    from models.device import choose_channels_last, choose_device, choose_dtype
    from reporting import benchmark, objective
    from reporting.logger import WandbLogger
    from reporting.reporter import RunReporter

    device = choose_device(cfg.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype = choose_dtype(cfg.dtype, device)
    channels_last = choose_channels_last(cfg.channels_last, device, dtype)
    if not isinstance(cfg.compile, bool):
        raise InputError(f"compile={cfg.compile} is unknown: true or false")
    method = instantiate(cfg.method)
    source, cache, logger = instantiate(cfg.task), instantiate(cfg.cache), instantiate(cfg.logger)
    own = [name for name in ("image", "prompt", "source_prompt") if cfg[name] is not None]
    if own and not source.single:
        raise InputError(f"{own[0]}= is for one picture: the tasks of a benchmark bring theirs")
    metrics, wanted = instantiate(cfg.metrics), objective.names(cfg.objective)
    if not isinstance(cfg.seed, int) or not 0 <= cfg.seed < 2**63:
        raise InputError(f"seed={cfg.seed} is out of range: a whole number, 0 or more")
    ema = cfg.model.get("ema")
    if ema not in (None, True, False):
        raise InputError(f"model.ema is {ema}: choose null, true or false")
    # On CUDA the same seed gives the same bytes (with attention=fused, where timing chose the same block sizes): an
    # operation that cannot give them raises. (With warn_only=True the backward pass of PyTorch's fused attention would
    # quietly use its faster kernel, which cannot.)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(device.type == "cuda")
    torch.utils.deterministic.fill_uninitialized_memory = False  # a check for bugs, which costs a pass over each tensor
    if cfg.attention == "fused" and (reason := why_not_fused(device)):
        raise InputError(reason)
    arch = OmegaConf.to_container(cfg.model.arch) if cfg.model.arch else None
    weights = find(cfg.model.weights)
    if arch is None and not (weights / "config.json").exists() and weights.exists():
        warnings.warn(f"{weights} comes with the settings for another model: name its kind, model=sd15", stacklevel=1)
    model = models.load(weights, arch=arch, device=device, dtype=dtype, ema=ema)
    model.unet.attention.backend = cfg.attention
    if channels_last:
        model.to(memory_format=torch.channels_last)
    if cfg.compile:
        model.unet.compile()
    kernels = [cfg.attention, channels_last, cfg.compile]
    multiple = model.autoencoder.downsampling * model.unet.downsampling
    size = model.image_size if cfg.size is None else cfg.size
    check_size(size, multiple)
    settings = OmegaConf.to_container(cfg, resolve=True)
    fingerprint = None if source.single and not cache.enabled else model.fingerprint
    if wanted:
        first = objective.example(source.load(source.entries[0], size, multiple), source.entries).to(device)
        objective.check(wanted, *metrics.measure(model, -first.image, first))

    def edit_one(entry: Entry, place: Path, seed: int) -> list[str]:
        task = source.load(entry, size, multiple).to(device)
        torch.manual_seed(seed)  # methods draw from generators of their own; this is for those that do not
        log = logger if source.single else WandbLogger("disabled")  # a benchmark's tasks are logged together
        reporter = RunReporter(place, model, task, method_name, cache, log, kernels, metrics, fingerprint)
        return reporter.finish(method.edit(model, task, reporter, seed))

    with logger.run(folder, settings):
        if source.single:
            print("\n".join(edit_one(source.entries[0], folder, cfg.seed)))
            rows = benchmark.rows_of(source.entries[0], folder, cfg.seed)
        else:
            benchmark.edit_all(source, folder, settings | {"weights": fingerprint}, cfg.seed, edit_one, logger)
            rows = benchmark.read_all(folder, source.share)
    return objective.value(wanted, rows), sum("error" in row for row in rows)


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # for users: no line of code
    outcome.run(main)
