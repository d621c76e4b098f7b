"""The contract of editing methods, and the run that serves them."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import InputError, check

RECONSTRUCTION = "reconstruction"  # in the place of settings: the input as the method gives it back

Result = tuple[dict[str, float | int | str] | str, Tensor]  # settings that tell an edit from its siblings, and a latent


class Run:
    """Everything that a method may ask for while it works. This one is silent and stores nothing; the runner's shows
    progress, draws curves and caches tuned states."""

    def __init__(self, seed: int = 0):
        self.seed = seed
        self.metrics: dict[str, float] = {}  # numbers of the method's own
        self.tensors: dict[str, Tensor] = {}  # products to store beside the pictures

    def noise(self, *stage: str | int) -> torch.Generator:
        """A generator for each (seed, stage), so that no stage's noise depends on whether another stage ran. It lives
        on the CPU, so that every device sees the same noise."""
        digest = hashlib.sha256(repr((self.seed, *stage)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def progress(self, stage: str) -> Callable[[Iterable], Iterable]:
        """A wrapper for the loop over a stage's steps, which shows how far along it is."""
        return iter

    def scalar(self, stage: str, step: int, **values: float) -> None:
        """Add one point to the curves of a stage."""

    def cached(self, stage: str, key: dict, build: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors that `build` gives, from an earlier run if one has stored them. `key` holds, in JSON's types, all
        that they depend on apart from the model and the image."""
        return build()


class Method:
    """The contract. A method is a dataclass whose fields, with their defaults, are the settings `method.NAME`. It opens
    no files, draws noise from the run alone, and hands the model back unchanged."""

    group = "method"  # its settings on the command line
    of_flows = False  # whether it takes a flow model, and no other

    def edit(self, model, task, z: Tensor, run: Run) -> Iterator[Result]:
        """Yield (settings, latent) for each edit of `z`, the latent (1, c, h, w) of the task's picture, in float64.

        Where the method can give the input back it also yields (RECONSTRUCTION, latent). Networks are frozen and
        gradients are off; the caller decodes each latent before it asks for the next one.
        """


@torch.no_grad()
def perform(method: Method, model, task, run: Run) -> Iterator[tuple[dict[str, Any] | str, Tensor, Tensor]]:
    """Yield (settings, latent, picture) for each of the method's results, with pictures (3, H, W) in [-1, 1], float32
    on the CPU. Raises InputError for a picture that is not finite.

    Latents are float64: only the network works in the model's precision, so that rounding does not add up along a path.
    No parameter asks for a gradient meanwhile, so that a backward pass to the text embedding skips them all.

    Outside `task.region` an edit is the input, whatever the method: its walks stay on the input's path, and its latent
    and at last its pixels are the input's own. A latent cell is free where any of its pixels is.
    """
    if method.of_flows and model.prediction != "flow":
        raise InputError("this method needs a flow model, such as model=sd35_medium")
    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
    checkpointing, schedule, region = model.unet.gradient_checkpointing, model.schedule, task.region
    try:
        model.requires_grad_(False)
        z = run.tensors["source_latent"] = model.encode_image(task.image).double()
        if region is not None:
            inside = F.adaptive_max_pool2d(region, z.shape[-2:]).to(z)
            model.schedule = schedule.confined(z, inside)
        with closing(method.edit(model, task, z, run)) as results:
            for settings, latent in results:
                confined = region is not None and settings != RECONSTRUCTION
                latent = torch.lerp(z, latent, inside) if confined else latent
                image = model.decode_latents(latent)[0].float().cpu()
                if not image.isfinite().all():
                    raise InputError("the edit is NaN or infinite: lower method.guidance_scale or use dtype=float32")
                if confined and task.feather is not None:
                    image = torch.lerp(task.image[0].cpu(), image, feathered(region, task.feather)[0].cpu())
                yield settings, latent, image.clamp(-1, 1)
    finally:
        for parameter, flag in asked.items():
            parameter.requires_grad_(flag)
        model.unet.gradient_checkpointing, model.schedule = checkpointing, schedule


def feathered(region: Tensor, width: int) -> Tensor:
    """`region` (1, 1, H, W), falling to 0 over the last `width` pixels inside its edge, and still 0 where it was: the
    mean of its erosions by 0 to `width` pixels. The picture's border is no edge."""
    total = region
    for _ in range(width):
        region = -F.max_pool2d(-region, 3, stride=1, padding=1)
        total = total + region
    return total / (width + 1)


def check_invertible(method: Any, **ranges: Any) -> None:
    """`check`, and raise InputError unless the sampler is without noise, and so can be walked both ways."""
    check(method, **ranges)
    if method.sampler.eta != 0:
        raise InputError("this method walks its path both ways, which takes sampler.eta=0")


def cosine(a: Tensor, b: Tensor) -> float:
    """The cosine of the angle between two tensors, taken as vectors."""
    a, b = a.detach().cpu().double().flatten(), b.detach().cpu().double().flatten()
    return float(a @ b / (a.norm() * b.norm()).clamp(min=1e-300))
