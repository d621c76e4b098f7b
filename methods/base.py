"""What editing methods share: the contract, the run that serves them, seeded noise and one optimisation loop.

A method is a dataclass of hyperparameters whose `edit(model, task, z, run)` maps the latent of a picture to edited
latents. It opens no files, draws noise from the run alone, and hands the model back unchanged.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from errors import InputError

RECONSTRUCTION = "reconstruction"  # in the place of settings: the input as the method gives it back

Result = tuple[dict[str, float | int | str] | str, Tensor]  # settings that tell an edit from its siblings, and a latent


class Run:
    """What a method may ask for while it works. This one is silent and stores nothing; the runner's shows progress,
    draws curves and caches tuned states."""

    def __init__(self, seed: int = 0):
        self.seed = seed
        self.metrics: dict[str, float] = {}  # numbers of the method's own
        self.tensors: dict[str, Tensor] = {}  # products worth keeping

    def noise(self, *stage: str | int) -> torch.Generator:
        """A generator for each (seed, stage), so that no stage's noise depends on whether another one ran. It lives
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
    """The contract. Subclasses are dataclasses whose fields, with their defaults, are the settings `method.NAME`."""

    def edit(self, model, task, z: Tensor, run: Run) -> Iterator[Result]:
        """Yield (settings, latent) for each edit of `z`, the latent (1, c, h, w) of the task's picture, in float64.

        Where the method can give the input back it also yields (RECONSTRUCTION, latent). Networks are frozen and
        gradients are off; the caller decodes each latent before it asks for the next one.
        """
        raise TypeError(f"{type(self).__name__} does not say how to edit")


@torch.no_grad()
def perform(method: Method, model, task, run: Run) -> Iterator[tuple[dict[str, Any] | str, Tensor, Tensor]]:
    """Encode the task's picture, freeze the networks, and yield (settings, latent, picture) for each of the method's
    results, with pictures (3, H, W) in [-1, 1]. Raises InputError where a result is not finite."""
    with frozen(model), closing(method.edit(model, task, source_latent(model, task.image), run)) as results:
        for settings, latent in results:
            yield settings, latent, to_image(model, latent)


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


def check(
    method: Any,
    *settings: str,
    low: float = 0,
    high: float = math.inf,
    whole: bool = False,
    many: bool = False,
) -> None:
    """Raise InputError unless each named setting is a finite number in [low, high], an integer where
    `whole`, or where `many` a list of such."""
    for setting in settings:
        value = getattr(method, setting)
        values = value if many and isinstance(value, Iterable) and not isinstance(value, str) else [value]
        kind = "a whole number" if whole else "a number"
        allowed = f"{kind} from {low} to {high}" if math.isfinite(high) else f"{kind}, {low} or more"
        allowed += ", or a list of them such as [0.4,0.6]" if many else ""
        for v in values:
            number = isinstance(v, int if whole else (int, float)) and not isinstance(v, bool)
            if not (number and math.isfinite(v) and low <= v <= high):
                raise InputError(f"method.{setting} is {value}: it must be {allowed}")


def check_choice(method: Any, choices: Iterable[str], *settings: str) -> None:
    """Raise InputError unless each named setting is one of `choices`."""
    for setting in settings:
        if (value := getattr(method, setting)) not in choices:
            raise InputError(f"method.{setting} is {value}: choose one of {', '.join(choices)}")


def check_invertible(method: Any) -> None:
    """Raise InputError unless the sampler is DDIM without noise, whose path alone can be walked both ways."""
    if method.sampler.kind != "ddim" or method.sampler.eta != 0:
        raise InputError("this method walks its path both ways, which takes sampler.kind=ddim and sampler.eta=0")


def cosine(a: Tensor, b: Tensor) -> float:
    """The cosine of the angle between two tensors, taken as vectors."""
    a, b = a.detach().cpu().double().flatten(), b.detach().cpu().double().flatten()
    return float(a @ b / (a.norm() * b.norm()).clamp(min=1e-300))


def source_latent(model, image: Tensor) -> Tensor:
    """An image (1, 3, H, W) -> its latent (1, c, h, w) in float64. Only the network works in the model's precision, so
    that rounding does not add up along a path, and a replay is exact."""
    return model.encode_image(image).double()


def to_image(model, latent: Tensor) -> Tensor:
    """A latent (1, c, h, w) -> its picture (3, H, W) in [-1, 1], float32 on the CPU. Raises InputError where
    the latent or the picture is not finite."""
    image = model.decode_latents(latent)[0].float().cpu()
    if not image.isfinite().all():
        raise InputError(
            "the edit became NaN or infinite while sampling: lower the learning rates or "
            "method.guidance_scale, or use dtype=float32"
        )
    return image.clamp(-1, 1)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter asks for a gradient, so that a backward pass to the text embedding skips them all;
    afterwards each asks as before."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        yield
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)


@contextmanager
def checkpointing(unet: nn.Module, on: bool) -> Iterator[None]:
    """Inside, if `on`, the UNet recomputes activations in the backward pass instead of keeping them."""
    before = unet.gradient_checkpointing
    unet.gradient_checkpointing = on or before
    try:
        yield
    finally:
        unet.gradient_checkpointing = before


@contextmanager
def replaced(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[dict[str, nn.Parameter]]:
    """Inside, the named parameters of `module` hold `values` and are handed out; afterwards they hold their own again.
    Values are used as they are if they fit, else as copies. On an accelerator the parameters' own values wait in the
    CPU's memory, so that the card holds one set of weights."""
    parameters = {name: module.get_parameter(name) for name in values}
    own = {name: parameter.data.cpu() for name, parameter in parameters.items()}  # the very same on the CPU
    try:
        for name, parameter in parameters.items():
            parameter.data = fitted(values[name], parameter.data)
        del values  # those used as they are would stay on the card while the parameters' own come back
        yield parameters
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name].to(parameter.device)


def fitted(value: Tensor, like: Tensor) -> Tensor:
    """`value` in the dtype, device and memory layout of `like`, and aligned as torch aligns what it allocates (a file
    mapped into memory is not): the kernels that are chosen depend on these, and so the last bit of a result."""
    fits = (value.dtype, value.device, value.stride()) == (like.dtype, like.device, like.stride())
    return value if fits and value.data_ptr() % 64 == 0 else torch.empty_like(like).copy_(value)


@contextmanager
def trainable(module: nn.Module, names: Iterable[str]) -> Iterator[dict[str, nn.Parameter]]:
    """`replaced` by copies of the named parameters' own values, which ask for gradients."""
    copies = {name: module.get_parameter(name).data.to("cpu", copy=True) for name in names}
    with replaced(module, copies) as parameters:
        del copies
        try:
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            yield parameters
        finally:
            for parameter in parameters.values():
                parameter.requires_grad_(False)
                parameter.grad = None  # left over from a backward pass that failed


def minimise(
    terms: Callable[[], dict[str, Tensor]],  # the terms of the loss, drawn anew at each call
    params: Sequence[Tensor],  # leaves that ask for gradients and have none yet
    steps: int,
    lr: float,
    optimizer: str,
    stage: str,
    setting: str,  # the learning rate's name, for the message
    run: Run,
    lean: bool = False,  # move each parameter as soon as its gradient is there, so that no two need exist at once
) -> dict[str, Tensor]:
    """Minimise the sum of `terms` over `params`, in place.

    Returns the curves, each (steps,): "loss", and the single terms where there are several. Parameters of
    less than 32 bits are optimised as float32 copies, since updates of 5e-7 would vanish in them. Raises
    InputError, naming stage and step, if the loss is NaN or infinite; no parameter has then moved at that step.
    """
    masters = [p.detach() if p.dtype == torch.float32 else p.detach().float() for p in params]
    pairs = list(zip(params, masters, strict=True))
    groups = [[pair] for pair in pairs] if lean else [pairs]  # one call for all parameters is faster than one for each
    updates = [partial(update, OPTIMIZERS[optimizer]([m for _, m in group], lr), group) for group in groups]
    hooks = []
    if lean:
        for param, move in zip(params, updates, strict=True):
            hooks.append(param.register_post_accumulate_grad_hook(lambda _, move=move: move()))
    curves: dict[str, list[float]] = {"loss": []}
    try:
        for step in run.progress(stage)(range(steps)):
            with torch.enable_grad():
                losses = terms()
                loss = sum(losses.values())
            values = {"loss": float(loss.detach())}
            if not math.isfinite(values["loss"]):
                raise InputError(f"the loss became {values['loss']} in stage '{stage}' at step {step}: lower {setting}")
            if len(losses) > 1:
                values |= {name: float(term.detach()) for name, term in losses.items()}
            for name, value in values.items():
                curves.setdefault(name, []).append(value)
            run.scalar(stage, step, **values)
            loss.backward()
            if not lean:
                updates[0]()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.tensor(curve) for name, curve in curves.items()}


@torch.no_grad()
def update(opt: torch.optim.Optimizer, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """A step of `opt`, which holds the masters, for (parameter, master) pairs. It uses up the parameters' gradients."""
    for param, master in pairs:
        master.grad, param.grad = param.grad.float(), None
    opt.step()
    for param, master in pairs:
        master.grad = None
        if param.dtype != master.dtype:
            param.copy_(master)


def cached_stage(
    run: Run, stage: str, key: dict, build: Callable[[], tuple[dict[str, Tensor], dict[str, Tensor]]]
) -> dict[str, Tensor]:
    """The tensors that `build` gives for `stage`, through `run.cached`. The curves, which it gives beside them, are
    stored with the tensors and drawn again on a hit; the mean of the loss's last tenth becomes a metric."""
    fresh = False

    def stored() -> dict[str, Tensor]:
        nonlocal fresh
        fresh = True
        tensors, curves = build()
        return {name: tensor.detach().contiguous() for name, tensor in tensors.items()} | {
            f"curve/{name}": curve for name, curve in curves.items()
        }

    state = run.cached(stage, key, stored)
    curves = {name.removeprefix("curve/"): state.pop(name) for name in list(state) if name.startswith("curve/")}
    if not fresh:
        for step, values in enumerate(zip(*(curve.tolist() for curve in curves.values()), strict=True)):
            run.scalar(stage, step, **dict(zip(curves, values, strict=True)))
    if len(loss := curves.get("loss", ())):
        run.metrics[f"{stage}_loss"] = float(loss[-max(1, len(loss) // 10) :].mean())
    return state
