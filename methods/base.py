"""What editing methods share: the contract, the run that serves them, and one optimisation loop."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

    def edit(self, model, task, z: Tensor, run: Run) -> Iterator[Result]:
        """Yield (settings, latent) for each edit of `z`, the latent (1, c, h, w) of the task's picture, in float64.

        Where the method can give the input back it also yields (RECONSTRUCTION, latent). Networks are frozen and
        gradients are off; the caller decodes each latent before it asks for the next one.
        """
        raise TypeError(f"{type(self).__name__} does not say how to edit")


@torch.no_grad()
def perform(method: Method, model, task, run: Run) -> Iterator[tuple[dict[str, Any] | str, Tensor, Tensor]]:
    """Yield (settings, latent, picture) for each of the method's results, with pictures (3, H, W) in [-1, 1], float32
    on the CPU. Raises InputError for a picture that is not finite.

    Latents are float64: only the network works in the model's precision, so that rounding does not add up along a path.
    No parameter asks for a gradient meanwhile, so that a backward pass to the text embedding skips them all.

    Outside `task.region` an edit is the input, whatever the method: its walks stay on the input's path, and its latent
    and at last its pixels are the input's own. A latent cell is free where any of its pixels is.
    """
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


def adafactor(params: Sequence[Tensor], lr: float) -> torch.optim.Optimizer:
    """Adafactor (Shazeer & Stern, 2018, arXiv 1804.04235) without its first moment: of the second moment of a weight
    it keeps only the means over rows and over columns. `lr` is absolute, as Adam's: a step is about `lr` long."""
    from timm.optim.adafactor import Adafactor  # seconds to import

    return Adafactor(params, lr=lr, scale_parameter=False)


OPTIMIZERS = {
    "adam": lambda params, lr: torch.optim.Adam(params, lr=lr, fused=True),
    "sgd": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
    "adafactor": adafactor,
}


def check_samples(method: Any, differ: bool) -> None:
    """Raise InputError for several samples that do not `differ`."""
    if method.num_samples > 1 and not differ:
        raise InputError(f"method.num_samples={method.num_samples} gives equal pictures: set sampler.eta above 0")


def check_invertible(method: Any, **ranges: Any) -> None:
    """`check`, and raise InputError unless the sampler is DDIM without noise, which alone can be walked both ways."""
    check(method, **ranges)
    if method.sampler.kind != "ddim" or method.sampler.eta != 0:
        raise InputError("this method walks its path both ways, which takes sampler.kind=ddim and sampler.eta=0")


def cosine(a: Tensor, b: Tensor) -> float:
    """The cosine of the angle between two tensors, taken as vectors."""
    a, b = a.detach().cpu().double().flatten(), b.detach().cpu().double().flatten()
    return float(a @ b / (a.norm() * b.norm()).clamp(min=1e-300))


@contextmanager
def restored(module: nn.Module, names: Iterable[str]) -> Iterator[dict[str, nn.Parameter]]:
    """Inside, the named parameters may be changed in place; afterwards they hold their own values again and are frozen.
    The values to restore wait in the CPU's memory, so that an accelerator holds one set of weights."""
    parameters = {name: module.get_parameter(name) for name in names}
    own = {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}
    try:
        yield parameters
    finally:
        for name, parameter in parameters.items():
            parameter.grad = None
            parameter.requires_grad_(False).copy_(own[name])


def minimise(
    loss: Callable[[], dict[str, Tensor]],  # the terms, whose sum is minimised
    params: Iterable[Tensor],
    run: Run,
    stage: str,
    steps: int,
    lr: float,
    optimizer: str = "adam",
    lean: bool = False,
) -> dict[str, list[float]]:
    """Move `params` in place, step by step, against the gradient of the loss, and return its curve, and those of its
    terms where there are several.

    Parameters of less than 32 bits are optimised as float32 masters, since updates of 5e-7 would vanish in them.
    `lean` moves each parameter during the backward pass and frees its gradient at once; the result is the same.
    Raises InputError, before a parameter has moved, for a loss that is NaN or infinite.
    """
    params = [param.requires_grad_() for param in params]
    masters = [p.detach() if p.dtype == torch.float32 else p.detach().float() for p in params]
    pairs = list(zip(params, masters, strict=True))
    groups = [[pair] for pair in pairs] if lean else [pairs]  # one call for all is faster than one for each
    moves = [partial(update, OPTIMIZERS[optimizer]([m for _, m in group], lr), group) for group in groups]
    curves: dict[str, list[float]] = {"loss": []}
    with torch.enable_grad(), ExitStack() as hooks:
        for param, move in zip(params, moves, strict=True) if lean else ():
            hooks.enter_context(param.register_post_accumulate_grad_hook(lambda _, move=move: move()))
        for step in run.progress(stage)(range(steps)):
            terms = loss()
            total = sum(terms.values())
            values = {"loss": total.item()} | {name: v.item() for name, v in terms.items() if len(terms) > 1}
            if not math.isfinite(values["loss"]):
                where = f"in stage '{stage}' at step {step}"
                raise InputError(f"the loss became {values['loss']} {where}: lower its learning rate")
            for name, value in values.items():
                curves.setdefault(name, []).append(value)
            run.scalar(stage, step, **values)
            total.backward()
            if not lean:
                moves[0]()
    return curves


@torch.no_grad()
def update(opt: torch.optim.Optimizer, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Take a step of `opt`, which holds the masters, for (parameter, master) pairs; free the parameters' gradients."""
    for param, master in pairs:
        master.grad, param.grad = param.grad.float(), None
    opt.step()
    for param, master in pairs:
        master.grad = None
        if param.dtype != master.dtype:
            param.copy_(master)


def cached_stage(
    run: Run, stage: str, key: dict, build: Callable[[], tuple[dict[str, Tensor], dict[str, list[float]]]]
) -> dict[str, Tensor]:
    """The tensors that `build` gives for `stage`, through `run.cached`. The curves, which it gives beside them, are
    stored with the tensors and drawn again on a hit; the mean of the loss's last tenth becomes a metric."""
    fresh = []

    def build_and_draw() -> dict[str, Tensor]:
        fresh.append(stage)
        tensors, curves = build()
        stored = {f"curve/{name}": torch.tensor(curve) for name, curve in curves.items()}
        return stored | {name: tensor.detach().contiguous() for name, tensor in tensors.items()}

    state = dict(run.cached(stage, key, build_and_draw))
    curves = {name.removeprefix("curve/"): state.pop(name).tolist() for name in list(state) if "curve/" in name}
    for step, values in enumerate([] if fresh else zip(*curves.values(), strict=True)):
        run.scalar(stage, step, **dict(zip(curves, values, strict=True)))
    if loss := curves.get("loss"):
        last = loss[-max(1, len(loss) // 10) :]
        run.metrics[f"{stage}_loss"] = sum(last) / len(last)
    return state


def tune(params: dict[str, Tensor], loss: Callable, run: Run, stage: str, key: dict, *how: Any) -> None:
    """`minimise` the loss over `params`, or take their values from an earlier run that has stored them."""
    build = lambda: (params, minimise(loss, params.values(), run, stage, *how))
    for name, value in cached_stage(run, stage, key, build).items():
        params[name].copy_(value)
