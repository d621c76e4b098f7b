"""Measure an edit: how well it shows the prompt, how much of the input it keeps, how near it is to a true result.

`X_to_input` and `X_to_truth` compare the edit with those pictures; `X_..._kept` does so outside the mask only.
PIE-Bench averages over the whole picture, the masked part black in both: its MSE is that times the share outside.
CLIP numbers come from the CLIP that the checkpoint carries, so they compare edits made with one model only. Where
`attainable` is 0, that CLIP does not prefer the target prompt even for the true result, and `success` says little.
LPIPS and the structure distance are those of PIE-Bench's evaluation (Ju et al., 2023, arXiv 2310.01506).

Images are (B, 3, H, W) in [-1, 1]. A `region` (1, 1, H, W) of bool restricts a metric to the pixels where it is true.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn

from data.tasks import EditTask


@dataclass
class Metrics:
    """All metrics of an edit. With `fetch` libraries download the weights of some at first use."""

    fetch: bool = False  # also LPIPS, the structure distance (0.3 GB), and a CLIP (1.7 GB) for a model without one

    def __post_init__(self) -> None:
        self.loaded: dict[str, Callable | None] = {}

    @torch.no_grad()
    def measure(self, model, image: Tensor, task: EditTask) -> dict[str, float]:
        """Return every finite metric of an edited image (1, 3, H, W) for which the task and the model have the means.
        Those `_to_truth` and `change_error` need a true result, those `_kept` a mask; `clip_metrics` says the rest."""
        others = {name: x.to(image) for name, x in (("input", task.image), ("truth", task.truth)) if x is not None}
        inside = None if task.mask is None else task.mask.to(image.device) > 0.5
        regions = {"": None} if inside is None or inside.all() else {"": None, "_kept": ~inside}
        compare = {"psnr": psnr, "mse": mse, "ssim": ssim, "lpips": self.load("lpips", image.device)}
        structure, numbers = self.load("structure_distance", image.device), {}
        for to, other in others.items():
            for kept, region in regions.items():
                numbers |= {f"{n}_to_{to}{kept}": f(image, other, region) for n, f in compare.items() if f}
            if structure:
                numbers[f"structure_distance_to_{to}"] = structure(image, other)
        if "truth" in others:
            numbers["change_error"] = change_error(image, *others.values())
        if clip := self.load("clip", model.device) if model.clip is None else model.clip:
            numbers |= clip_metrics(clip, image, others, task.prompt, task.source_prompt, inside)
        return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}

    def load(self, name: str, device: torch.device) -> Callable | None:
        """Load one of LOADERS once; None without `fetch`, and after a warning where it cannot be loaded."""
        if self.fetch and name not in self.loaded:
            try:
                self.loaded[name] = LOADERS[name](device)
            except Exception as error:  # each library has its own errors for a missing network; none may end a run
                self.loaded[name] = None
                warnings.warn(f"{name} is left out: {error!r}", stacklevel=2)
        return self.loaded.get(name)


def change_error(image: Tensor, source: Tensor, truth: Tensor) -> float:
    """Root-mean-square distance of an edit to the true result, over that of the input, within the changed region. 0 is
    the true result, 1 the input itself; NaN where the true result equals the input. The changed region is where any
    channel of the two differs by more than rounding, 1.5 of 255 grey levels."""
    changed = (truth - source).abs().amax(dim=1, keepdim=True) > 3 / 255
    return math.sqrt(mse(image, truth, changed) / mse(source, truth, changed)) if changed.any() else math.nan


# CLIP (Radford et al., 2021).


def clip_metrics(
    clip, image: Tensor, others: dict[str, Tensor], prompt: str, source_prompt: str = "", inside: Tensor | None = None
) -> dict[str, Tensor]:
    """Cosines of CLIP's features of an edit, of the `others` ("input", and where it is known "truth"), and of texts.

    clip_score        of a picture and the prompt (Hessel et al., 2021, without their factor 2.5): of the edit, of the
                      edit inside the mask and black outside, and INPUT_clip_score of the others
    clip_similarity   of the edit and another picture
    clip_margin       the score under the prompt minus that under the source prompt, in [-2, 2]
    clip_directional  of the change of pictures and that of texts (Gal et al., 2021, arXiv 2108.00946); NaN if one is 0

    And three judgements, 1 or 0. `success`, the edit was done: `change_error` is at most 1/2 and `clip_margin` above 0;
    NaN where the true result equals the input. `success_closer`, a weaker one: the margin is above 0, and the edit is
    closer to the truth than the input is, in pixels and features. `attainable`: the true result's margin is above 0.
    """
    edit, *seen = (clip.image_features(x)[0] for x in (image, *others.values()))
    (text,), numbers = clip.text_features([prompt]), {}
    numbers["clip_score"] = edit @ text
    for to, other in zip(others, seen, strict=True):
        numbers |= {f"{to}_clip_score": other @ text, f"clip_similarity_to_{to}": edit @ other}
    if inside is not None and inside.any():
        numbers["clip_score_edited"] = clip.image_features(black_but(image, inside))[0] @ text
    if source_prompt:
        turn, change = text - clip.text_features([source_prompt])[0], edit - seen[0]
        numbers["clip_margin"] = edit @ turn
        numbers["clip_directional"] = change @ turn / (change.norm() * turn.norm())
        if "truth" in others:
            source, truth = others.values()
            shown, error = numbers["clip_margin"] > 0, change_error(image, source, truth)
            closer = mse(image, truth) < mse(source, truth) and edit @ seen[1] > seen[0] @ seen[1]
            numbers |= {"attainable": seen[1] @ turn > 0, "success_closer": shown and closer}
            numbers["success"] = error if math.isnan(error) else shown and error <= 0.5
    return numbers


# Pixels.


def mse(a: Tensor, b: Tensor, region: Tensor | None = None) -> float:
    """Mean squared difference of pixels, on a scale from 0 to 1."""
    squared = ((a.float() - b.float()) / 2).clamp(-1, 1).square()
    return (squared if region is None else squared[region.expand_as(squared)]).mean().item()


def psnr(a: Tensor, b: Tensor, region: Tensor | None = None) -> float:
    """Peak signal-to-noise ratio in dB, -10 log10(mse); at most 100, which stands for equal."""
    error = mse(a, b, region)
    return min(-10 * math.log10(error), 100.0) if error else 100.0


def ssim(a: Tensor, b: Tensor, region: Tensor | None = None) -> float:
    """Structural similarity (Wang et al., 2004), in [-1, 1], of images of at least 6 pixels a side: the mean of its map
    over pixels and channels, with a Gaussian window of 11 pixels and sigma 1.5, reflected at the border. Pixels
    outside the region are black in both, so that they do not reach into the windows of those inside."""
    a, b = ((black_but(image, region).double() + 1) / 2 for image in (a, b))
    c1, c2 = 0.01**2, 0.03**2
    mean_a, mean_b = window_mean(a), window_mean(b)
    var_a, var_b = window_mean(a * a) - mean_a**2, window_mean(b * b) - mean_b**2
    covariance = window_mean(a * b) - mean_a * mean_b
    likeness = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    likeness = likeness * (2 * covariance + c2) / (var_a + var_b + c2)
    return (likeness if region is None else likeness[region.expand_as(likeness)]).mean().item()


def window_mean(x: Tensor) -> Tensor:
    """Gaussian-weighted mean around each pixel of (B, C, H, W)."""
    weights = torch.exp(-(torch.arange(-5, 6, device=x.device, dtype=x.dtype) ** 2) / (2 * 1.5**2))
    window = repeat(torch.outer(weights, weights) / weights.sum() ** 2, "h w -> c 1 h w", c=x.shape[1])
    return F.conv2d(F.pad(x, (5, 5, 5, 5), mode="reflect"), window, groups=x.shape[1])


def black_but(image: Tensor, region: Tensor | None) -> Tensor:
    """The image, black outside the region, as PIE-Bench restricts a metric to a part."""
    return image if region is None else torch.where(region, image, -1.0)


# Metrics with weights of their own.


def lpips(device: torch.device) -> Callable:
    """LPIPS (Zhang et al., 2018) on SqueezeNet's features; 0 for equal images, black outside the region."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    distance = LearnedPerceptualImagePatchSimilarity(net_type="squeeze").to(device).eval()
    return lambda a, b, region=None: distance(black_but(a, region).float(), black_but(b, region).float())


def structure_distance(device: torch.device, name="vit_base_patch8_224.dino", pretrained=True) -> Callable:
    """Distance between the layouts of two images (Tumanyan et al., 2022, arXiv 2201.00424, equation 3): the mean
    squared difference of S, the cosines between the keys of all tokens in the last layer of DINO's ViT-B/8 at 224
    pixels. 0 for equal images; PIE-Bench's tables show it times 1000.

    To match those tables the input is that of PIE-Bench's code: pixels from 0 to 255, normalised by ImageNet's
    statistics for 0 to 1, and resized without antialiasing."""
    import timm
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    vit = timm.create_model(name, pretrained=pretrained, num_classes=0, dynamic_img_size=True)
    vit = vit.to(device).eval().requires_grad_(False)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    patch, qkv = vit.patch_embed.patch_size[0], []
    vit.blocks[-1].attn.qkv.register_forward_hook(lambda *call: qkv.append(call[-1]))

    def self_similarity(image: Tensor) -> Tensor:
        """(1, 3, H, W) -> S, (1, N, N), for N tokens: the patches and the class token."""
        size = [round(side * 224 / min(image.shape[-2:]) / patch) * patch for side in image.shape[-2:]]
        image = F.interpolate((image.float() + 1) * 127.5, size, mode="bilinear")
        vit((image - mean) / std)
        keys = F.normalize(qkv.pop().chunk(3, dim=-1)[1], dim=-1)  # of all heads, concatenated
        return keys @ keys.mT

    return lambda a, b: F.mse_loss(self_similarity(a), self_similarity(b))


def public_clip(device: torch.device) -> nn.Module:
    """OpenAI's CLIP ViT-L/14, which PIE-Bench scores with."""
    import open_clip

    from models.text import Clip, TextEncoder

    towers = open_clip.create_model("ViT-L-14-quickgelu", pretrained="openai", force_custom_text=True, device=device)
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    clip = Clip(towers.visual, TextEncoder(towers.text), towers.visual.image_size[0], mean, std)
    return clip.to(device).eval().requires_grad_(False)


LOADERS = {"lpips": lpips, "structure_distance": structure_distance, "clip": public_clip}
