"""Judging a trained model: reconstructions, CLIP, and samples under two judges, with grids to look at."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import Dataset

from data.images import to_pil
from models.autoencoder import Autoencoder
from models.latent_diffusion import LatentDiffusion
from models.text import Clip
from samplers import ddim, guided


def pictures(dataset: Dataset, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
    """Pictures (B, 3, H, W) in [-1, 1] and their captions."""
    items = [dataset[i] for i in indices]
    return torch.stack([i["image"] for i in items]).float() / 127.5 - 1, [i["caption"] for i in items]


def grid(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> one picture (3, H', 8 W), the last row filled up with white."""
    images = torch.cat([images, images.new_ones(-len(images) % 8, *images.shape[1:])])
    return rearrange(images, "(r c) ch h w -> ch (r h) (c w)", c=8)


@torch.no_grad()
def reconstruct(autoencoder: Autoencoder, images: Tensor) -> tuple[float, Tensor]:
    """Encode and decode pictures (B, 3, H, W) in [-1, 1]: their mean PSNR in dB, and a grid of the first 32 pairs."""
    device = next(autoencoder.parameters()).device
    decoded = torch.cat([autoencoder.decode(autoencoder.encode(x.to(device))).cpu() for x in images.split(32)])
    psnr = 10 * (4 / (decoded - images).square().mean(dim=(1, 2, 3))).log10()
    return psnr.mean().item(), grid(torch.stack([images[:32], decoded[:32]], dim=1).flatten(0, 1))


@torch.no_grad()
def sample(model: LatentDiffusion, prompts: Sequence[str], guidance_scale: float, seed: int, steps: int = 30) -> Tensor:
    """One picture (B, 3, H, W) in [-1, 1] per prompt, from noise, by DDIM with guidance."""
    trajectory, generator = model.schedule.trajectory(steps), torch.Generator().manual_seed(seed)
    noise = torch.randn(len(prompts), *model.latent_shape, generator=generator).to(model.device)
    images = []
    for i in range(0, len(prompts), 50):
        denoise = guided(model, model.encode_text(prompts[i : i + 50]), guidance_scale)
        z = ddim.sample(denoise, noise[i : i + 50], trajectory)
        images.append(model.decode_latents(z).clamp(-1, 1).cpu())
    return torch.cat(images)


def top1(scores: Tensor, captions: Sequence[str], choices: int = 100) -> float:
    """The share of rows whose best column has the row's caption: scores (N, N), of picture i and caption j. Each row
    chooses among the columns of its own block of `choices`; captions that occur twice in a block count as right."""
    names = np.array(captions)
    blocks = [slice(i, i + choices) for i in range(0, len(names), choices)]
    right = [names[b][scores[b, b].argmax(dim=1).cpu()] == names[b] for b in blocks]
    return float(np.concatenate(right).mean())


@torch.no_grad()
def clip_scores(clip: Clip, images: Tensor, captions: Sequence[str]) -> Tensor:
    """Cosines (N, N) of the features of pictures (N, 3, H, W) and captions."""
    device = clip.logit_scale.device
    image_features = torch.cat([clip.image_features(x.to(device)) for x in images.split(100)])
    text_features = torch.cat([clip.text_features(captions[i : i + 100]) for i in range(0, len(captions), 100)])
    return image_features @ text_features.T


def pixel_scores(samples: Tensor, drawings: Tensor) -> Tensor:
    """Minus the distances (N, N) of samples to drawings (N, 3, H, W), blurred by two pixels: an untrained judge."""
    from torchvision.transforms.functional import gaussian_blur

    return -torch.cdist(*(gaussian_blur(x, [13, 13], [2.0, 2.0]).flatten(1) for x in (samples, drawings)))


@torch.no_grad()
def evaluate(model: LatentDiffusion, datasets: Mapping[str, Dataset], out: Path, seed: int, settings: Mapping) -> None:
    """Judge the model on data sets that training did not draw, by the settings of conf/part/evaluation.yaml: print the
    numbers, and write `evaluation.json`, grids of pictures and their captions to `out`.

    Each share is the top 1 of 100: of true pictures and of samples, by the model's CLIP among captions, and of samples
    in pixels, where the true drawings of the captions stand to choose from.
    """
    numbers, n = {}, settings["samples"]
    for name, dataset in datasets.items():
        images, captions = pictures(dataset, range(settings["pictures"]))
        numbers[f"autoencoder_{name}_psnr"], pairs = reconstruct(model.autoencoder, images)
        numbers[f"clip_top1_of_100_{name}"] = top1(clip_scores(model.clip, images, captions), captions)
        images, captions = images[:n], captions[:n]
        samples = sample(model, captions, settings["guidance_scale"], seed, settings["steps"])
        numbers[f"samples_top1_of_100_{name}"] = top1(clip_scores(model.clip, samples, captions), captions)
        numbers[f"samples_pixels_top1_of_100_{name}"] = top1(pixel_scores(samples, images), captions)
        to_pil(grid(samples[:64])).save(out / f"samples_{name}.png")
        (out / f"samples_{name}.txt").write_text("\n".join(captions[:64]) + "\n")
    to_pil(pairs).save(out / "reconstructions.png")  # of the held-out pictures, which come last
    results = {name: round(value, 4) for name, value in numbers.items()}
    report = json.dumps({"settings": dict(settings), "results": results}, indent=1)
    print(report)
    (out / "evaluation.json").write_text(report + "\n")
