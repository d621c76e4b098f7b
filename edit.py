"""Edit one picture, or every task of a benchmark, with one method. Wiring only; see conf/edit.yaml.

python edit.py method=imagic image=dog.jpg prompt="a sitting dog"
"""

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from errors import InputError, check_number
from evaluation import cli, config

config.register()


@hydra.main(version_base="1.3", config_path="conf", config_name="edit")
def main(cfg: DictConfig) -> float | list[float] | None:
    with cli.job():
        hydra_config = HydraConfig.get()
        shared = int(os.environ.get("WORLD_SIZE", 1)) > 1
        named = any("hydra.run.dir=" in given for given in hydra_config.overrides.hydra)
        if shared and (hydra_config.mode == RunMode.MULTIRUN or not named):
            cli.end("error: torchrun shares the tasks of one run: name a hydra.run.dir=PATH, no --multirun", 1)
        value, failed = edit(cfg, Path(hydra_config.runtime.output_dir), hydra_config.runtime.choices)
        # A sweep says so in its own end, and torchrun would stop the other processes.
        if failed and hydra_config.mode == RunMode.RUN and not shared:
            cli.end(f"error: {failed} tasks failed: results.csv says why", 1)
        return value


def edit(
    cfg: DictConfig, folder: Path, choices: DictConfig, load: Callable | None = None
) -> tuple[float | list[float] | None, int]:
    """Run one job. Returns the means that a sweeper optimises, and the number of failed tasks. The user's settings are
    checked before the model is loaded, by models.load or in its place by `load`."""
    import torch

    import models
    from data.images import find
    from evaluation import runner
    from models.attention import check_backend
    from models.device import choose_channels_last, choose_device, choose_dtype
    from models.graphs import StepGraph

    others = {"model.ema": None, "compile": "graph"}  # beside true and false
    for name in ("deterministic", "metrics.fetch", "mask_pixels", "task.confine", *others):
        value = OmegaConf.select(cfg, name, default=False)
        if value not in (True, False, others.get(name, False)):
            raise InputError(f"{name}={value} is unknown: true, false{' or graph' * (name == 'compile')}")
    check_number("seed", cfg.seed, whole=True, high=2**63 - 1)
    check_number("mask_feather", cfg.mask_feather, whole=True, high=4096)
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    if cfg.deterministic != torch.are_deterministic_algorithms_enabled():  # setting it takes seconds
        torch.use_deterministic_algorithms(cfg.deterministic)
    device = choose_device(cfg.device)
    dtype = choose_dtype(cfg.dtype, device, large=choices.family is not None)
    channels_last = choose_channels_last(cfg.channels_last, device, dtype)
    if device.index:
        torch.cuda.set_device(device)
    check_backend(cfg.attention, device)
    if cfg.compile == "graph" and device.type != "cuda":
        raise InputError("compile=graph takes a CUDA device")
    nodes = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    parts = ("method", "task", "cache", "logger", "metrics")
    method, source, cache, logger, metrics = (config.build(nodes, name) for name in parts)
    names = ("image", "prompt", "source_prompt", "negative_prompt", "mask")
    own = [name for name in names if cfg[name] not in (None, "")]
    if own and not source.single:
        raise InputError(f"{own[0]}= is for one picture: the tasks of a benchmark bring theirs")
    arch = OmegaConf.to_container(cfg.model.arch) if cfg.model.arch else None
    how = {name: cfg.model[name] and find(cfg.model[name]) for name in ("vae", "tokenizer") if name in cfg.model}
    encoders = nodes["model"].get("text") or []
    how["text"] = [find(path) for path in (encoders if isinstance(encoders, list) else [encoders])]
    how |= {"arch": arch, "device": device, "dtype": dtype, "ema": cfg.model.ema}
    model = (load or models.load)(find(cfg.model.weights), **how)
    model.unet.attention.backend = cfg.attention
    if channels_last:
        model.to(memory_format=torch.channels_last)
    if cfg.compile == "graph":
        model.unet.forward = StepGraph(model.unet)
    elif cfg.compile:
        model.unet.compile()
    size, multiple = model.image_size if cfg.size is None else cfg.size, model.multiple
    if not isinstance(size, int) or size < 1 or size % multiple:
        raise InputError(f"size={size}: the side in pixels must be a multiple of {multiple} for this model")
    fingerprint = None if source.single and not cache.enabled else model.fingerprint
    kernels = [cfg.attention, channels_last, cfg.compile, cfg.deterministic]
    editor = runner.Editor(model, method, choices.method, metrics, cache, logger, kernels, fingerprint)

    def edit_one(entry, place: Path, seed: int) -> tuple[list[dict], dict]:
        task = source.load(entry, size, multiple).to(device)
        task.feather = cfg.mask_feather if cfg.mask_pixels else None
        return editor.edit_task(task, place, seed, alone=source.single)

    settings = nodes | {"weights": fingerprint}
    if int(os.environ.get("RANK", 0)) > 0:
        logger.mode = "disabled"  # the first process of torchrun logs the whole run
    with logger.run(folder, settings):
        rows = runner.edit_all(source, folder, edit_one, cfg.seed, settings)
        logger.report(folder, rows)
    return runner.objective(cfg.objective, rows), len({row["task"] for row in rows if "error" in row})


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)  # of libraries, for their own users
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # for users: no line of code
    cli.run(main)
