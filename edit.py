"""Edit one image, or every task of a benchmark, with one method. Wiring only; see conf/edit.yaml.

python edit.py method=imagic image=dog.jpg prompt="a sitting dog"
"""

import os
import warnings
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from errors import InputError
from reporting import outcome


@hydra.main(version_base="1.3", config_path="conf", config_name="edit")
def main(cfg: DictConfig) -> None:
    with outcome.job():
        edit(cfg, Path(HydraConfig.get().runtime.output_dir), HydraConfig.get().runtime.choices.method)


def edit(cfg: DictConfig, folder: Path, method_name: str) -> None:
    """One run. What the user can get wrong is constructed, and so checked, before the work begins."""
    from dataclasses import replace

    import torch
    from hydra.utils import instantiate

    import models.attention
    from data.images import find
    from models.placement import choose_device, choose_dtype
    from reporting.reporter import RunReporter

    device, dtype = choose_device(cfg.device), choose_dtype(cfg.dtype)
    method = instantiate(cfg.method)
    source, cache, logger = instantiate(cfg.task), instantiate(cfg.cache), instantiate(cfg.logger)
    metrics = instantiate(cfg.metrics)
    if not isinstance(cfg.seed, int) or not 0 <= cfg.seed < 2**63:
        raise InputError(f"seed={cfg.seed} is out of range: a whole number, 0 or more")
    ema, slices = cfg.model.get("ema"), cfg.model.get("vae_slices", 1)
    if ema not in (None, True, False):
        raise InputError(f"model.ema is {ema}: choose null, true or false")
    if not isinstance(slices, int) or slices < 1:
        raise InputError(f"model.vae_slices is {slices}: it must be a whole number, 1 or more")
    torch.manual_seed(cfg.seed)  # methods draw from generators of their own; this is for those that do not
    # On CUDA the same seed gives the same bytes: an operation that cannot give them raises. (With warn_only=True the
    # backward pass of fused attention would quietly use its faster kernel, which cannot.)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(device.type == "cuda")
    models.attention.set_backend(cfg.attention)
    arch = OmegaConf.to_container(cfg.model.arch) if cfg.model.arch else None
    weights = find(cfg.model.weights)
    if arch is None and not (weights / "config.json").exists() and weights.exists():
        warnings.warn(f"{weights} comes with the settings for another model: name its kind, model=sd15", stacklevel=1)
    model = models.load(weights, arch=arch, device=device, dtype=dtype, ema=ema)
    model.autoencoder.slices = slices
    multiple = model.autoencoder.downsampling * model.unet.downsampling
    tasks = list(source.tasks(model.image_size if cfg.size is None else cfg.size, multiple))

    with logger.run(folder, OmegaConf.to_container(cfg, resolve=True)):
        for task in tasks:
            task = replace(task, image=task.image.to(device))
            place = folder if len(tasks) == 1 else folder / task.name
            reporter = RunReporter(place, model, task, method_name, cache, logger, cfg.attention, metrics)
            result = method.edit(model, task, reporter, cfg.seed)
            print("\n".join(reporter.finish(result)))


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # for users: no line of code
    outcome.run(main)
