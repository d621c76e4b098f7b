"""What is measured on an edit: how well it shows the text, how much of the input it keeps, and where the true result
is known, how close it came.

`X_to_input` and `X_to_truth` compare with those pictures, `..._kept` only where the mask says that the picture should
stay as it is. (PIE-Bench averages PSNR, MSE and SSIM over the whole picture, the edited part black in both: its MSE is
lower by the share that is kept, and its PSNR higher by -10 log10 of it.) The CLIP numbers are taken with the CLIP that
the checkpoint carries, so they compare edits made with one model only. `attainable` says whether that CLIP finds the
target prompt in the true result itself, rather than the source prompt; where it does not, `success` says little.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from data.tasks import EditTask
from errors import InputError
from metrics.clip import clip_directional, clip_margin, clip_score, clip_similarity
from metrics.fetched import fetched
from metrics.pixels import black_but, mse, psnr, ssim


@dataclass
class Metrics:
    """`fetch`: also what needs weights that a library fetches once, LPIPS, the structure distance, and where the model
    carries no CLIP, a public one."""

    fetch: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.fetch, bool):
            raise InputError(f"metrics.fetch={self.fetch} is unknown: true or false")

    @torch.no_grad()
    def measure(self, model, image: Tensor, task: EditTask) -> tuple[dict[str, float], dict[str, str]]:
        """Every number that applies to an edited image (1, 3, H, W) of a task, and by name those that do not, each with
        the reason."""
        if not image.isfinite().all():
            raise InputError("the edited picture has values that are infinite or not numbers: try dtype=float32")
        image = image.clamp(-1, 1)
        source, truth = task.image.to(image), None if task.truth is None else task.truth.to(image)
        edited = None if task.mask is None else task.mask.to(image.device) > 0.5
        kept = None if edited is None else ~edited
        clip, no_clip = (model.clip, "") if model.clip is not None else self.fetched("clip", image.device)
        lpips, no_lpips = self.fetched("lpips", image.device)
        structure, no_structure = self.fetched("structure_distance", image.device)
        no_truth = "the task has no true result" if truth is None else ""
        no_source = "" if task.source_prompt else "the task has no source prompt"
        no_mask = "the task has no mask" if edited is None else ""
        nothing_kept = no_mask or ("" if kept.any() else "the mask covers the whole picture")
        nothing_edited = no_mask or ("" if edited.any() else "the mask covers nothing")
        likenesses = {  # name: (function, why it cannot be had, whether it can be restricted to a part)
            "psnr": (psnr, "", True),
            "mse": (mse, "", True),
            "ssim": (ssim, "", True),
            "clip_similarity": (partial(clip_similarity, clip), no_clip, True),
            "lpips": (lpips, no_lpips, True),
            "structure_distance": (structure, no_structure, False),
            "latent_distance": (partial(latent_distance, model), "", False),
        }
        numbers: dict[str, float] = {}
        left_out: dict[str, str] = {}

        def number(name: str, why_not: str, compute: Callable, *arguments) -> None:
            value = math.nan if why_not else float(compute(*arguments))
            if math.isnan(value):
                left_out[name] = why_not or "it is not a number: nothing changed, so 0/0, or an overflow"
            else:
                numbers[name] = value

        for to, reference, missing in (("input", source, ""), ("truth", truth, no_truth)):
            for name, (compare, why_not, restrictable) in likenesses.items():
                number(f"{name}_to_{to}", missing or why_not, compare, image, reference)
                if restrictable:
                    number(f"{name}_to_{to}_kept", missing or nothing_kept or why_not, compare, image, reference, kept)
        prompts = (task.source_prompt, task.prompt)
        number("clip_score", no_clip, clip_score, clip, image, prompts[1:])
        number("clip_score_edited", nothing_edited or no_clip, clip_score, clip, black_but(image, edited), prompts[1:])
        number("clip_margin", no_source or no_clip, clip_margin, clip, image, *prompts)
        number("clip_directional", no_source or no_clip, clip_directional, clip, source, image, *prompts)
        no_success = no_truth or no_source or no_clip
        number("success", no_success, succeeds, clip, image, source, truth, *prompts)
        number("attainable", no_success, lambda: clip_margin(clip, truth, *prompts) > 0)
        return numbers, left_out

    @torch.no_grad()
    def read(self, model, image: Tensor, task: EditTask) -> dict[str, float]:
        """What CLIP makes of any picture, the input or the true result among them: clip_score, and clip_margin where
        there is a source prompt."""
        clip = model.clip or self.fetched("clip", image.device)[0]
        if clip is None:
            return {}
        numbers = {"clip_score": clip_score(clip, image, [task.prompt]).item()}
        if task.source_prompt:
            numbers["clip_margin"] = clip_margin(clip, image, task.source_prompt, task.prompt).item()
        return numbers

    def fetched(self, name: str, device: torch.device) -> tuple[Callable | None, str]:
        """What is fetched under `name` and "", or None and why not."""
        return fetched(name, device) if self.fetch else (None, "it needs weights to be fetched: metrics.fetch=true")


def succeeds(clip, image: Tensor, source: Tensor, truth: Tensor, source_prompt: str, prompt: str) -> bool:
    """Whether an edit is closer to the true result than the input is, both pixel by pixel and as CLIP sees it, and CLIP
    finds the target prompt in it rather than the source prompt. (In pixels alone an input that is merely blurred is
    closer too, more often than not.)"""
    closer = mse(image, truth) < mse(source, truth)
    closer = closer and bool(clip_similarity(clip, image, truth) > clip_similarity(clip, source, truth))
    return closer and bool(clip_margin(clip, image, source_prompt, prompt) > 0)


def latent_distance(model, a: Tensor, b: Tensor) -> float:
    """1 - the cosine between the latents of two images, in [0, 2]."""
    a, b = (model.encode_image(x).flatten().double() for x in (a, b))
    return 1 - F.cosine_similarity(a, b, dim=0).item()
