"""Train one part of a text-to-image model: `python train.py part=autoencoder|clip|unet`, or judge all of it:
`python train.py part=evaluation`.

Wiring only: the loop is in training/loop.py, the losses in training/parts.py, the settings in conf/. Under
`torchrun --nproc-per-node=N train.py ...` N processes share each batch.
"""

import logging
import os
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from errors import InputError

log = logging.getLogger("train")


@hydra.main(config_path="conf", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> None:
    try:
        finished = run(cfg)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    if not finished:
        print("stopped by SIGTERM; the state is saved, and the same command goes on from it", file=sys.stderr)
        sys.exit(143)


def run(cfg: DictConfig) -> bool:
    import torch
    import torch.distributed as dist

    from training.logger import Logger
    from training.loop import Settings, train
    from training.setup import assemble, evaluate

    device = torch.device(cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if cfg.part.name == "evaluation":
        evaluate(cfg, device)
        return True

    distributed = "WORLD_SIZE" in os.environ
    if distributed:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
    out = Path(cfg.out)
    objective, dataset = assemble(cfg, out)
    settings = Settings(**OmegaConf.to_container(cfg.part.training, resolve=True), seed=cfg.seed)
    settings.autocast = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and device.type == "cuda")
    main_process = not distributed or dist.get_rank() == 0
    logger = Logger(cfg, out) if main_process else None
    try:
        return train(
            objective,
            dataset,
            settings,
            out / "training" / f"{cfg.part.name}.pt",
            device,
            logger or (lambda *_: None),
        )
    finally:
        if logger:
            logger.close()
        if distributed:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
