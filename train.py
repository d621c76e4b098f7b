"""Train one part of a text-to-image model: `python train.py part=autoencoder|clip|unet`, or judge all of it:
`python train.py part=evaluation`.

Wiring only: the loop is in training/loop.py, the losses in training/parts.py, the settings in conf/train.yaml. Under
`torchrun --nproc-per-node=N train.py ...` N processes share each batch.
"""

import os
from contextlib import contextmanager
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from errors import InputError
from evaluation import cli


@hydra.main(config_path="conf", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> None:
    with cli.job():
        if not run(cfg):
            cli.end("stopped by SIGTERM; the state is saved, and the same command goes on from it", 143)


def run(cfg: DictConfig) -> bool:
    """Train or evaluate; False if a SIGTERM cut it short."""
    import torch

    from models.placement import choose_device, keep_memory
    from training.logger import TrainingLogger
    from training.loop import Settings, train
    from training.setup import assemble, evaluate

    if cfg.part.name == "evaluation":
        evaluate(cfg, choose_device(cfg.device))
        return True
    if cfg.dtype not in ("auto", "float32", "bfloat16"):
        raise InputError(f"dtype={cfg.dtype} is unknown: auto, float32 or bfloat16")
    if not isinstance(cfg.seed, int) or cfg.seed < 0:
        raise InputError(f"seed={cfg.seed} is out of range: a whole number, 0 or more")
    keep_memory()
    settings = Settings(**OmegaConf.to_container(cfg.part.training, resolve=True), seed=cfg.seed)
    with process_group(cfg.device) as (rank, device):
        torch.set_float32_matmul_precision("high")
        settings.autocast = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and device.type == "cuda")
        out = Path(cfg.out)
        objective, dataset = assemble(cfg, out)
        state_file = out / "training" / f"{cfg.part.name}.pt"
        with TrainingLogger(cfg, out, active=rank == 0) as log:
            return train(objective, dataset, settings, state_file, device, log)


@contextmanager
def process_group(device_name: str):
    """(rank, device) of this process, joined to the others where torchrun started several."""
    import torch
    import torch.distributed as dist

    from models.placement import choose_device

    device = choose_device(device_name)
    if "WORLD_SIZE" not in os.environ:
        yield 0, device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank(), device
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    cli.run(main)
