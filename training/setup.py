"""From the settings to the objects: the model under training, its data, and the evaluation of the whole."""

from __future__ import annotations

import json
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import Dataset

from data.images import to_pil
from errors import InputError
from files import whole_file
from models import LatentDiffusion, build, load
from models.checkpoints import SECTIONS_OF, fill, part_of, read_config, read_part
from models.text import compact_vocabulary
from training.parts import (
    AutoencoderObjective,
    ClipObjective,
    UNetObjective,
    grid,
    mean_psnr,
    pictures,
    sample,
    top1_of,
)

NEEDS = {"autoencoder": [], "clip": [], "unet": ["autoencoder", "clip"]}  # parts that must be trained before


def datasets(cfg: DictConfig, image_size: int) -> tuple[Dataset, Dataset]:
    """The training pictures and the held-out ones."""
    train = hydra.utils.instantiate(cfg.data.train, size=image_size, seed=cfg.seed)
    heldout = hydra.utils.instantiate(cfg.data.heldout, size=image_size, seed=cfg.seed + 1)
    return train, heldout


def assemble(cfg: DictConfig, out: Path) -> tuple[torch.nn.Module, Dataset]:
    """The objective of `cfg.part`, on a model whose other parts are read from `out`, and its training data."""
    part = cfg.part.name
    arch = OmegaConf.to_container(cfg.arch, resolve=True)
    if (out / "config.json").exists():
        arch = reconciled(arch, read_config(out), part, out)
    train, heldout = datasets(cfg, arch["image_size"])
    states = {p: read_part(out, p) for p in NEEDS[part]}
    if cfg.init:  # a training state in `out`, where there is one, is resumed all the same
        states[part] = read_part(Path(cfg.init), part)
    if "clip" in states:
        vocabulary = states["clip"].get("text.vocabulary")
    else:
        vocabulary = compact_vocabulary(train.vocabulary()) if part == "clip" else None
    model = build(arch, seed=cfg.seed, vocabulary=vocabulary)
    for p, state in states.items():
        fill(part_of(model, p), state, (Path(cfg.init) if p == part else out) / f"{p}.safetensors")
    out.mkdir(parents=True, exist_ok=True)
    options = OmegaConf.to_container(cfg.part.objective, resolve=True)
    if part == "autoencoder":
        return AutoencoderObjective(model, out, heldout, **options), train
    if part == "clip":
        probe = hydra.utils.instantiate(cfg.data.train, size=arch["image_size"], seed=cfg.seed + 1)
        return ClipObjective(model, out, {"trained": probe, "heldout": heldout}, **options), train
    prompts = options.pop("prompts") or pictures(train, range(10**8, 10**8 + 16))[1]
    return UNetObjective(model, out, heldout, prompts, **options), train


def reconciled(arch: dict, stored: dict, part: str, out: Path) -> dict:
    """`arch` with what earlier parts measured (the latents' scale). Raises InputError where it contradicts the sizes
    of a part that is already trained."""
    arch["vae"]["scale_factor"] = stored["vae"]["scale_factor"]
    for other, sections in SECTIONS_OF.items():
        if other == part or not (out / f"{other}.safetensors").exists():
            continue
        for section in sections:
            if stored.get(section) != arch.get(section):
                raise InputError(
                    f"arch.{section} differs from that of {out / other}.safetensors, which is already trained: "
                    "choose another `out`, or the same sizes"
                )
    return arch


@torch.no_grad()
def evaluate(cfg: DictConfig, device: torch.device) -> dict[str, float]:
    """Judge the checkpoint in `cfg.out`: print the numbers, write `evaluation.json` and sample grids beside it."""
    out = Path(cfg.out)
    model: LatentDiffusion = load(out, device=device)
    train, heldout = datasets(OmegaConf.merge(cfg, {"seed": cfg.seed + 1}), model.image_size)
    n = cfg.part.pictures
    numbers = {}
    images, captions = pictures(heldout, range(n))
    decoded = torch.cat([model.decode_latents(model.encode_image(x)).cpu() for x in images.split(32)])
    numbers["autoencoder_heldout_psnr"] = mean_psnr(decoded, images)
    numbers["clip_top1_of_100_heldout"] = top1_of(model.clip, images, captions)
    train_images, train_captions = pictures(train, range(n))
    numbers["clip_top1_of_100_trained"] = top1_of(model.clip, train_images, train_captions)
    grids = {"reconstructions": grid(torch.stack([images[:32], decoded[:32]], dim=1).flatten(0, 1), 8)}
    for name, prompts in (("trained", train_captions), ("heldout", captions)):
        prompts = prompts[: cfg.part.samples]
        drawn = sample(model, prompts, cfg.part.guidance_scale, cfg.seed, cfg.part.steps)
        numbers[f"samples_top1_of_100_{name}"] = top1_of(model.clip, drawn, prompts)
        grids[f"samples_{name}"] = grid(drawn[:64], 8)
        with whole_file(out / f"samples_{name}.txt") as partial:
            partial.write_text("\n".join(prompts[:64]) + "\n")
    numbers = {k: round(v, 4) for k, v in numbers.items()}
    for name, value in numbers.items():
        print(f"{name:32s} {value}")
    settings = OmegaConf.to_container(cfg.part, resolve=True)
    with whole_file(out / "evaluation.json") as partial:
        partial.write_text(json.dumps({"settings": settings, "results": numbers}, indent=1) + "\n")
    for name, picture in grids.items():
        with whole_file(out / f"{name}.png") as partial:
            to_pil(picture).save(partial, format="PNG")
    return numbers
