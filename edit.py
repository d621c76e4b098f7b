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
        if os.environ.get("WORLD_SIZE", "1") != "1":
            cli.end("error: torchrun is for train.py; processes of edit.py share a list by task.shard=0/4, 1/4, ...", 1)
        value, failed = edit(cfg, Path(hydra_config.runtime.output_dir), hydra_config.runtime.choices)
        if failed and hydra_config.mode == RunMode.RUN:  # a sweep says so in its own end
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
    from models.device import choose_device, choose_dtype
    from models.graphs import StepGraph

    others = {"model.ema": None, "compile": "graph", "channels_last": "auto"}  # beside true and false
    for name in ("deterministic", "metrics.fetch", "mask_pixels", "task.confine", *others):
        value = OmegaConf.select(cfg, name, default=False)
        if not isinstance(value, bool) and (name not in others or value != others[name]):  # 1 is not true
            more = f", {others[name] or 'null'}" if name in others else ""
            raise InputError(f"{name}={value} is unknown: true, false{more}")
    check_number("seed", cfg.seed, whole=True, high=2**63 - 1)
    check_number("mask_feather", cfg.mask_feather, whole=True, high=4096)
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    if cfg.deterministic != torch.are_deterministic_algorithms_enabled():  # setting it takes seconds
        torch.use_deterministic_algorithms(cfg.deterministic)
    device = choose_device(cfg.device)
    dtype = choose_dtype(cfg.dtype, device, large=choices.family is not None)
    convolves_fast = device.type == "cuda" and dtype != torch.float32  # with feature maps that lie channels last
    channels_last = convolves_fast if cfg.channels_last == "auto" else cfg.channels_last
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # an earlier edit of this process may have had another
    check_backend(cfg.attention, device)
    if cfg.compile == "graph" and device.type != "cuda":
        raise InputError("compile=graph takes a CUDA device")
    nodes = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    parts = ("method", "task", "cache", "logger", "metrics")
    method, source, cache, logger, metrics = (config.build(nodes, name) for name in parts)
    own = [n for n in ("image", "prompt", "source_prompt", "negative_prompt", "mask") if cfg[n] not in (None, "")]
    if own and not source.single:
        raise InputError(f"{own[0]}= is for one picture: the tasks of a benchmark bring theirs")
    given = nodes.get("model") or {}
    how = {name: given[name] and find(given[name]) for name in ("vae", "tokenizer") if name in given}
    encoders = given.get("text") or []
    how["text"] = [find(path) for path in (encoders if isinstance(encoders, list) else [encoders])]
    how |= {"arch": given.get("arch") or None, "device": device, "dtype": dtype, "ema": given.get("ema")}
    model = (load or models.load)(find(given.get("weights")), **how)
    model.unet.attention.backend = cfg.attention
    if channels_last:
        model.to(memory_format=torch.channels_last)
    if cfg.compile == "graph":
        model.unet.forward = StepGraph(model.unet)
    elif cfg.compile:
        model.unet.compile()
    size, multiple = model.image_size if cfg.size is None else cfg.size, model.multiple
    if not isinstance(size, int) or size not in range(multiple, 2**15, multiple):  # larger ones fit in no memory
        raise InputError(f"size={size}: the side in pixels must be a multiple of {multiple} for this model (to 32767)")
    fingerprint = None if source.single and not cache.enabled else model.fingerprint
    kernels = [cfg.attention, channels_last, cfg.compile, cfg.deterministic]
    editor = runner.Editor(model, method, choices.method, metrics, cache, logger, kernels, fingerprint)

    def edit_one(entry, place: Path, seed: int) -> tuple[list[dict], dict]:
        task = source.load(entry, size, multiple).to(device)
        task.feather = cfg.mask_feather if cfg.mask_pixels else None
        return editor.edit_task(task, place, seed, alone=source.single)

    settings = nodes | {"weights": fingerprint}
    about = settings | {"chosen": {group: choices.get(group) for group in ("method", "inversion", "model", "task")}}
    subject = Path(nodes["task"].get("path") or choices.get("task", "")).name
    if source.single:  # with the texts of the bundled example
        about |= {name: str(getattr(source.entries[0], name)) for name in ("image", "prompt", "source_prompt")}
        subject = about["prompt"]
    with logger.run(folder, about, choices.method, subject):
        rows = runner.edit_all(source, folder, edit_one, cfg.seed, settings)
        logger.report(folder, rows)
    return runner.objective(cfg.objective, rows), len({row["task"] for row in rows if "error" in row})


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)  # of libraries, for their own users
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # for users: no line of code
    cli.run(main)
