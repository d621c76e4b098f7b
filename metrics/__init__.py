"""What is measured on an edit: how well it shows the text, and how much of the input it keeps.

Images are (B, 3, H, W) in [-1, 1]. The CLIP numbers are taken with the CLIP that the
checkpoint carries, so they compare edits made with one model only. Imagic's figure 8 sets the same CLIP score
against another measure of likeness, 1 - LPIPS.
"""

import torch
from torch import Tensor

from data.tasks import EditTask


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of 8-bit-range images; 100 at most, which stands for equal."""
    error = (a.float() - b.float()).clamp(-2, 2).square().mean().item()
    return min(100.0, -10 * torch.tensor(error / 4).log10().item()) if error else 100.0


@torch.no_grad()
def clip_score(clip, images: Tensor, prompts: list[str]) -> Tensor:
    """Cosine between the CLIP features of each image and of its prompt, (B,) in [-1, 1] (Hessel et al., 2021,
    without their factor of 2.5)."""
    return (clip.image_features(images) * clip.text_features(prompts)).sum(-1).float()


@torch.no_grad()
def clip_similarity(clip, a: Tensor, b: Tensor) -> Tensor:
    """Cosine between the CLIP image features of a and b, (B,) in [-1, 1]."""
    return (clip.image_features(a) * clip.image_features(b)).sum(-1).float()


def measure(model, image: Tensor, task: EditTask) -> dict[str, float]:
    """Every number that applies to an edited image (1, 3, H, W) of a task; CLIP's where the model has it."""
    image = image.clamp(-1, 1)
    numbers = {"psnr_to_input": psnr(image, task.image)}
    if task.truth is not None:
        numbers["psnr_to_truth"] = psnr(image, task.truth)
    if model.clip is not None:
        numbers["clip_score"] = clip_score(model.clip, image, [task.prompt]).item()
        numbers["clip_similarity"] = clip_similarity(model.clip, image, task.image).item()
    return numbers
