"""Where training's numbers and pictures go: W&B, a JSON-lines file, and PNG files."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from data.images import to_pil
from files import whole_file


class TrainingLogger:
    """Called by the loop with (numbers, pictures, step). Where several processes train, one is `active`."""

    def __init__(self, cfg: DictConfig, out: Path, active: bool = True):
        self.cfg, self.folder, self.active = cfg, out / "training", active
        self.part = cfg.part.name
        self.wandb = hydra.utils.instantiate(cfg.logger)
        self.exits = ExitStack()

    def __enter__(self) -> TrainingLogger:
        if self.active:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.exits.enter_context(self.wandb.run(self.folder, OmegaConf.to_container(self.cfg, resolve=True)))
        return self

    def __exit__(self, *error) -> None:
        self.exits.__exit__(*error)

    def __call__(self, numbers: dict[str, float], pictures: dict[str, Tensor], step: int) -> None:
        if not self.active:
            return
        with (self.folder / f"{self.part}.jsonl").open("a") as file:
            file.write(json.dumps({"step": step} | numbers) + "\n")
        self.wandb.scalars(self.part, step, numbers)
        if pictures:
            tqdm.write(f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in numbers.items()))
            images = {name: to_pil(picture) for name, picture in pictures.items()}
            for name, image in images.items():
                with whole_file(self.folder / f"{name}_{step:07d}.png") as partial:
                    image.save(partial, format="PNG")
            self.wandb.pictures(images)
