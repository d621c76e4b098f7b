"""What every editing method shares: its result, its reporter, seeded noise and one optimisation loop.

A method is a class whose constructor takes the hyperparameters and whose `edit(model, task, reporter, seed)`
returns an `EditResult`. It opens no files, and hands the model back unchanged.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from errors import InputError


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


@dataclass
class Edit:
    """One edited picture. `settings`, printed under it, is what distinguishes it from its siblings."""

    image: Tensor  # (3, H, W) in [-1, 1]
    settings: dict[str, float | int | str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class EditResult:
    """The edits, the input as the method can give it back, and products worth keeping."""

    edits: list[Edit]
    reconstruction: Tensor  # (3, H, W) in [-1, 1]
    metrics: dict[str, float] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)  # float64 is kept as float32

    def __post_init__(self) -> None:
        self.tensors = {name: t.float() if t.dtype == torch.float64 else t for name, t in self.tensors.items()}


class Reporter:
    """What a method says while it works. This one is silent and keeps nothing; the runner's shows and
    stores."""

    def progress(self, iterable: Iterable, stage: str, total: int | None = None) -> Iterator:
        """Pass the items on, showing how far along `stage` is."""
        yield from iterable

    def scalar(self, stage: str, step: int, **values: float) -> None:
        """One point of the curves of `stage`."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what happens inside. What belongs to "reconstruction" only shows what the method gives back of the
        input, and is no part of an edit's cost."""
        yield

    def cached(self, key: dict, build: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors that `build` gives, from an earlier run if one is kept. `key` holds, in JSON's types,
        all that they depend on apart from the model and the image."""
        return build()


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


def generator(seed: int, *stage: str | int) -> torch.Generator:
    """A generator for each (seed, stage), so that no stage's noise depends on whether another one ran. It
    lives on the CPU, so that every device sees the same noise."""
    digest = hashlib.sha256(repr((seed, *stage)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def cosine(a: Tensor, b: Tensor) -> float:
    """The cosine of the angle between two tensors, taken as vectors."""
    a, b = a.detach().cpu().double().flatten(), b.detach().cpu().double().flatten()
    return float(a @ b / (a.norm() * b.norm()).clamp(min=1e-300))


def source_latent(model, image: Tensor) -> Tensor:
    """An image (1, 3, H, W) -> its latent (1, c, h, w), in float64: walks are kept in it and only the network works in
    the model's precision (see `guided`), so that a replay is exact whatever that is. Apple's GPUs have no float64."""
    z = model.encode_image(image)
    return z.to(torch.float32 if z.device.type == "mps" else torch.float64)


def to_image(model, latent: Tensor) -> Tensor:
    """A latent (1, c, h, w) -> its picture (3, H, W) in [-1, 1], float32 on the CPU. Raises InputError where
    the latent or the picture is not finite."""
    image = model.decode_latents(latent.to(model.dtype))[0].float().cpu()
    if not image.isfinite().all():
        raise InputError(
            "the edit became NaN or infinite while sampling: lower the learning rates or "
            "method.guidance_scale, or use dtype=float32"
        )
    return image.clamp(-1, 1)


@contextmanager
def any_kernels() -> Iterator[None]:
    """Inside, an operation that has no deterministic kernel is only warned of, where it would raise otherwise."""
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(min(mode, 1))
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


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
    reporter: Reporter,
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
        for step in reporter.progress(range(steps), stage, steps):
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
            reporter.scalar(stage, step, **values)
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
    reporter: Reporter,
    stage: str,
    key: dict,
    build: Callable[[], tuple[dict[str, Tensor], dict[str, Tensor]]],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The (tensors, curves) that `build` gives for `stage`, through `reporter.cached`. The curves are kept
    with the tensors and told again on a hit, so that a run that reuses a tuning draws the same plots."""
    fresh = False

    def run() -> dict[str, Tensor]:
        nonlocal fresh
        fresh = True
        with reporter.stage(stage):
            tensors, curves = build()
        kept = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        return kept | {f"curve/{name}": curve for name, curve in curves.items()}

    state = reporter.cached({"stage": stage, **key}, run)
    curves = {name.removeprefix("curve/"): t for name, t in state.items() if name.startswith("curve/")}
    if not fresh:
        for step, values in enumerate(zip(*(curve.tolist() for curve in curves.values()), strict=True)):
            reporter.scalar(stage, step, **dict(zip(curves, values, strict=True)))
    return {name: t for name, t in state.items() if not name.startswith("curve/")}, curves
