"""Judging a trained model: reconstructions, CLIP, and samples under two judges, with grids to look at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import Dataset

from data.images import to_pil
from files import whole_file
from models.latent_diffusion import LatentDiffusion
from models.text import Clip
from samplers import Sampler, guided, noise_like


def pictures(dataset: Dataset, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
    """Pictures (B, 3, H, W) in [-1, 1] and their captions."""
    items = [dataset[i] for i in indices]
    return torch.stack([i["image"] for i in items]).float() / 127.5 - 1, [i["caption"] for i in items]


def mean_psnr(a: Tensor, b: Tensor) -> float:
    """PSNR in dB of each picture in [-1, 1] against its twin, averaged over the batch."""
    return (10 * (4 / (a - b).square().mean(dim=(1, 2, 3))).log10()).mean().item()


def grid(images: Tensor, columns: int = 8) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> one picture (3, H', W'), the last row filled up with white."""
    missing = -len(images) % columns
    images = torch.cat([images, images.new_ones(missing, *images.shape[1:])])
    return rearrange(images, "(r c) ch h w -> ch (r h) (c w)", c=columns)


@torch.no_grad()
def sample(model: LatentDiffusion, prompts: Sequence[str], guidance_scale: float, seed: int, steps: int = 30) -> Tensor:
    """One picture (B, 3, H, W) in [-1, 1] per prompt, from noise, by DDIM with guidance."""
    sampler = Sampler(steps=steps)
    like = torch.empty(len(prompts), *model.latent_shape, device=model.device, dtype=model.dtype)
    noise = noise_like(like, torch.Generator().manual_seed(seed))
    images = []
    for i in range(0, len(prompts), 50):
        denoise = guided(model, model.encode_text(prompts[i : i + 50]), guidance_scale)
        z = sampler.sample(denoise, noise[i : i + 50], sampler.trajectory(model.schedule))
        images.append(model.decode_latents(z).clamp(-1, 1).cpu())
    return torch.cat(images)


def top1(scores: Tensor, captions: Sequence[str], choices: int = 100) -> float:
    """The share of rows whose best column has the row's caption: scores (N, N), of picture i and caption j. Each row
    chooses among the columns of its own block of `choices`; captions that occur twice in a block count as right."""
    right = 0
    for start in range(0, len(captions), choices):
        block = slice(start, start + choices)
        names = captions[block]
        best = scores[block, block].argmax(dim=1).tolist()
        right += sum(names[b] == name for b, name in zip(best, names, strict=True))
    return right / len(captions)


@torch.no_grad()
def clip_scores(clip: Clip, images: Tensor, captions: Sequence[str]) -> Tensor:
    """Cosines (N, N) of the features of pictures (N, 3, H, W) and captions."""
    device = clip.logit_scale.device
    image_features = torch.cat([clip.image_features(x.to(device)) for x in images.split(100)])
    text_features = torch.cat([clip.text_features(captions[i : i + 100]) for i in range(0, len(captions), 100)])
    return image_features @ text_features.T


def pixel_scores(samples: Tensor, drawings: Tensor, sigma: float = 2.0) -> Tensor:
    """Minus the distances (N, N) between samples and true drawings (N, 3, H, W), both after a Gaussian blur of `sigma`
    pixels: a judge that no training has touched."""
    from torchvision.transforms.functional import gaussian_blur

    kernel = 2 * round(3 * sigma) + 1
    a, b = (gaussian_blur(x, [kernel, kernel], [sigma, sigma]).flatten(1) for x in (samples, drawings))
    return -torch.cdist(a, b)


@torch.no_grad()
def evaluate(model: LatentDiffusion, datasets: Mapping[str, Dataset], out: Path, seed: int, settings: Mapping) -> dict:
    """Judge the model on data sets that training did not draw: print the numbers, and write `evaluation.json`, grids
    of pictures and their captions to `out`.

    `settings` (conf/part/evaluation.yaml): pictures, samples, guidance_scale, steps. Each share is the top 1 of 100:
    of true pictures and of samples, by the model's CLIP among captions, and of samples in pixels, where the true
    drawings of the captions stand to choose from.
    """
    numbers, grids = {}, {}
    for name, dataset in datasets.items():
        images, captions = pictures(dataset, range(settings["pictures"]))
        decoded = torch.cat([model.decode_latents(model.encode_image(x)).cpu() for x in images.split(32)])
        numbers[f"autoencoder_{name}_psnr"] = mean_psnr(decoded, images)
        numbers[f"clip_top1_of_100_{name}"] = top1(clip_scores(model.clip, images, captions), captions)
        pairs = torch.stack([images[:32], decoded[:32]], dim=1).flatten(0, 1)
        grids["reconstructions"] = grid(pairs)  # the held-out pictures' stay, which come last
        n = min(settings["samples"], len(images))
        images, captions = images[:n], captions[:n]
        samples = sample(model, captions, settings["guidance_scale"], seed, settings["steps"])
        numbers[f"samples_top1_of_100_{name}"] = top1(clip_scores(model.clip, samples, captions), captions)
        numbers[f"samples_pixels_top1_of_100_{name}"] = top1(pixel_scores(samples, images), captions)
        grids[f"samples_{name}"] = grid(samples[:64])
        with whole_file(out / f"samples_{name}.txt") as partial:
            partial.write_text("\n".join(captions[:64]) + "\n")
    numbers = {k: round(v, 4) for k, v in numbers.items()}
    for name, value in numbers.items():
        print(f"{name:36s} {value}")
    with whole_file(out / "evaluation.json") as partial:
        partial.write_text(json.dumps({"settings": dict(settings), "results": numbers}, indent=1) + "\n")
    for name, picture in grids.items():
        with whole_file(out / f"{name}.png") as partial:
            to_pil(picture).save(partial, format="PNG")
    return numbers
