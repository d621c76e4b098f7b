"""Where training's numbers and pictures go: W&B, a JSON-lines file, and PNG files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor
from tqdm import tqdm


def save_grid(picture: Tensor, file: Path) -> None:
    """Write a picture (3, H, W) in [0, 1] as PNG."""
    file.parent.mkdir(parents=True, exist_ok=True)
    array = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(array).save(file)


class Logger:
    """Called by the loop with (numbers, pictures, step)."""

    def __init__(self, cfg: DictConfig, out: Path):
        self.part, self.out = cfg.part.name, out
        self.file = out / "training" / f"{self.part}.jsonl"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.wandb = None
        if cfg.logger.mode != "disabled":
            import wandb

            self.wandb = wandb.init(
                project=cfg.logger.project,
                name=f"train {self.part}",
                mode=cfg.logger.mode,
                dir=str(self.file.parent),
                config=OmegaConf.to_container(cfg, resolve=True),
                settings=wandb.Settings(silent=True),
            )

    def __call__(self, numbers: dict[str, float], pictures: dict[str, Tensor], step: int) -> None:
        with self.file.open("a") as f:
            f.write(json.dumps({"step": step} | numbers) + "\n")
        for name, picture in pictures.items():
            save_grid(picture, self.out / "training" / f"{name}_{step:07d}.png")
        if pictures:
            tqdm.write(f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in numbers.items()))
        if self.wandb:
            import wandb

            images = {k: wandb.Image(v.float().cpu()) for k, v in pictures.items()}
            self.wandb.log(numbers | images, step=step)

    def close(self) -> None:
        if self.wandb:
            self.wandb.finish()
