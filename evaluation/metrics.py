"""Measure an edit: how well it shows the prompt, how much of the input it keeps, how near it is to a true result.

`X_to_input` and `X_to_truth` compare the edit with those pictures; `X_..._kept` does so outside the mask only.
PIE-Bench averages over the whole picture, the masked part black in both: its MSE is that times the share outside.
CLIP numbers come from the CLIP that the checkpoint carries, so they compare edits made with one model only. Where
`attainable` is 0, that CLIP does not prefer the target prompt even for the true result, and `success` says little.
LPIPS and the structure distance are those of PIE-Bench's evaluation (Ju et al., 2023, arXiv 2310.01506).

Images are (B, 3, H, W) in [-1, 1]. A `region` (1, 1, H, W) of bool restricts a metric to the pixels where it is true.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn

from data.tasks import EditTask
from errors import InputError


@dataclass
class Metrics:
    """All metrics of an edit. With `fetch`, also those whose weights a library downloads at first use: LPIPS, the
    structure distance, and a public CLIP for a model that has none."""

    fetch: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.fetch, bool):
            raise InputError(f"metrics.fetch={self.fetch} is unknown: true or false")
        self._loaded: dict[str, tuple[Callable | None, str]] = {}

    @torch.no_grad()
    def measure(self, model, image: Tensor, task: EditTask) -> tuple[dict[str, float], dict[str, str]]:
        """Return every metric of an edited image (1, 3, H, W), and the reason for each that is left out.

        Raises InputError where the image is not finite.
        """
        if not image.isfinite().all():
            raise InputError("the edited picture has values that are infinite or not numbers: try dtype=float32")
        image = image.clamp(-1, 1)
        source, truth = task.image.to(image), None if task.truth is None else task.truth.to(image)
        inside = None if task.mask is None else task.mask.to(image.device) > 0.5
        outside = None if inside is None else ~inside
        clip, no_clip = self.clip(model)
        perceptual, no_lpips = self.load("lpips", image.device)
        structure, no_structure = self.load("structure_distance", image.device)
        lacking = {  # the reason why something that a metric needs is not there, or ""
            "clip": no_clip, "clip_similarity": no_clip, "lpips": no_lpips, "structure_distance": no_structure,
            "truth": "" if truth is not None else "the task has no true result",
            "source": "" if task.source_prompt else "the task has no source prompt",
            "inside": "" if inside is not None and inside.any() else "no mask, or an empty one",
            "outside": "" if inside is not None and outside.any() else "no mask, or one of the whole picture",
        }  # fmt: skip
        numbers: dict[str, float] = {}
        left_out: dict[str, str] = {}

        def number(name: str, needs: Sequence[str], compute: Callable, *arguments) -> None:
            reason = next((lacking[need] for need in needs if lacking.get(need)), "")
            value = math.nan if reason else float(compute(*arguments))
            if math.isnan(value):
                left_out[name] = reason or "undefined (0/0: nothing changed)"
            else:
                numbers[name] = value

        similarity = partial(clip_similarity, clip)
        comparisons = {"psnr": psnr, "mse": mse, "ssim": ssim, "clip_similarity": similarity, "lpips": perceptual}
        for to, other in (("input", source), ("truth", truth)):
            for name, compare in comparisons.items():
                number(f"{name}_to_{to}", [to, name], compare, image, other)
                number(f"{name}_to_{to}_kept", [to, "outside", name], compare, image, other, outside)
            number(f"structure_distance_to_{to}", [to, "structure_distance"], structure, image, other)
            number(f"latent_distance_to_{to}", [to], latent_distance, model, image, other)
        prompts = (task.source_prompt, task.prompt)
        number("clip_score", ["clip"], clip_score, clip, image, prompts[1:])
        number("clip_score_edited", ["inside", "clip"], clip_score, clip, black_but(image, inside), prompts[1:])
        number("clip_margin", ["source", "clip"], clip_margin, clip, image, *prompts)
        number("clip_directional", ["source", "clip"], clip_directional, clip, source, image, *prompts)
        number("change_error", ["truth"], change_error, image, source, truth)
        known = ["truth", "source", "clip"]
        number("success", known, success, clip, image, source, truth, *prompts)
        number("success_closer", known, success_closer, clip, image, source, truth, *prompts)
        number("attainable", known, lambda: clip_margin(clip, truth, *prompts) > 0)
        return numbers, left_out

    def clip(self, model):
        """The model's CLIP, or a public one; and the reason where there is none."""
        return (model.clip, "") if model.clip is not None else self.load("clip", model.device)

    def load(self, name: str, device: torch.device) -> tuple[Callable | None, str]:
        """Load one of LOADERS once. Returns it and "", or None and the reason in one line."""
        if not self.fetch:
            return None, "its weights are downloaded only with metrics.fetch=true"
        if name not in self._loaded:
            try:
                self._loaded[name] = LOADERS[name](device), ""
            except Exception as error:  # each library has its own errors for a missing network; none may end a run
                line = " ".join(str(error).split())[:200]
                self._loaded[name] = None, f"it could not be loaded ({type(error).__name__}: {line})"
        return self._loaded[name]


# Success: whether the edit was done.


def change_error(image: Tensor, source: Tensor, truth: Tensor) -> float:
    """Root-mean-square distance of an edit to the true result, over that of the input, within the changed region.

    0 is the true result, 1 the input itself; NaN where the true result equals the input. The changed region is where
    any channel of the two differs by more than rounding, 1.5 of 255 grey levels.
    """
    changed = (truth - source).abs().amax(dim=1, keepdim=True) > 3 / 255
    return math.sqrt(mse(image, truth, changed) / mse(source, truth, changed)) if changed.any() else math.nan


def success(clip, image: Tensor, source: Tensor, truth: Tensor, source_prompt: str, prompt: str) -> float:
    """1 if the edit was done: `change_error` is at most 1/2, and CLIP prefers the target prompt to the source prompt.
    NaN where the true result equals the input."""
    error = change_error(image, source, truth)
    return error if math.isnan(error) else float(error <= 0.5 and clip_margin(clip, image, source_prompt, prompt) > 0)


def success_closer(clip, image: Tensor, source: Tensor, truth: Tensor, source_prompt: str, prompt: str) -> bool:
    """A weaker success: the edit is closer to the true result than the input is, over the whole picture in pixels and
    in CLIP's features, and CLIP prefers the target prompt. A small step in the right direction is enough."""
    closer = mse(image, truth) < mse(source, truth)
    closer = closer and bool(clip_similarity(clip, image, truth) > clip_similarity(clip, source, truth))
    return closer and bool(clip_margin(clip, image, source_prompt, prompt) > 0)


# CLIP (Radford et al., 2021): cosines, (B,).


def clip_score(clip, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Cosine between the features of each image and of its prompt (Hessel et al., 2021, without their factor 2.5)."""
    return (clip.image_features(images) * clip.text_features(prompts)).sum(-1)


def clip_margin(clip, images: Tensor, source_prompt: str, prompt: str) -> Tensor:
    """Score under the target prompt minus that under the source prompt, in [-2, 2]."""
    target, source = clip.text_features([prompt, source_prompt])
    return clip.image_features(images) @ (target - source)


def clip_similarity(clip, a: Tensor, b: Tensor, region: Tensor | None = None) -> Tensor:
    """Cosine between the image features of a and b, black outside the region."""
    return (clip.image_features(black_but(a, region)) * clip.image_features(black_but(b, region))).sum(-1)


def clip_directional(clip, source: Tensor, edit: Tensor, source_prompt: str, prompt: str) -> Tensor:
    """Cosine between the change of the image features and that of the text features (Gal et al., 2021, arXiv
    2108.00946, section 4.1); NaN where either did not change."""
    image = clip.image_features(edit) - clip.image_features(source)
    text = clip.text_features([prompt]) - clip.text_features([source_prompt])
    return (image * text).sum(-1) / (image.norm(dim=-1) * text.norm(dim=-1))


# Pixels and latents.


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
    weights, channels = weights / weights.sum(), x.shape[1]
    x = F.pad(x, (5, 5, 5, 5), mode="reflect")
    x = F.conv2d(x, repeat(weights, "k -> c 1 k 1", c=channels), groups=channels)
    return F.conv2d(x, repeat(weights, "k -> c 1 1 k", c=channels), groups=channels)


def black_but(image: Tensor, region: Tensor | None) -> Tensor:
    """The image, black outside the region, as PIE-Bench restricts a metric to a part."""
    return image if region is None else torch.where(region, image, -1.0)


def latent_distance(model, a: Tensor, b: Tensor) -> float:
    """1 - the cosine between the latents of two images, in [0, 2]."""
    a, b = (model.encode_image(x).flatten().double() for x in (a, b))
    return 1 - F.cosine_similarity(a, b, dim=0).item()


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
