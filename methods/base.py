"""What editing methods share: the contract, the run that serves them, seeded noise and one optimisation loop.

A method is a dataclass of hyperparameters whose `edit(model, task, z, run)` maps the latent of a picture to edited
latents. It opens no files, draws noise from the run alone, and hands the model back unchanged.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    method: Any, *settings: str, low: float = 0, high: float = math.inf, whole: bool = False, many: bool = False
) -> None:
    """Raise InputError unless each named setting is a number in [low, high], an integer where `whole`, or where `many`
    a number or a list of at least one. None passes where it is the default."""
    for setting in settings:
        value = getattr(method, setting)
        if value is None and getattr(type(method), setting) is None:
            continue
        values = value if many and isinstance(value, Sequence) and not isinstance(value, str) else [value]
        for v in values or [None]:
            if not isinstance(v, int if whole else (int, float)) or not low <= v <= high or math.isinf(v):
                kind = "whole number" if whole else "number"
                raise InputError(f"method.{setting} is {value}: it must be a {kind} from {low} to {high}")


def check_choice(method: Any, choices: Iterable[str], *settings: str) -> None:
    """Raise InputError unless each named setting is one of `choices`."""
    for setting in settings:
        if (value := getattr(method, setting)) not in choices:
            raise InputError(f"method.{setting} is {value}: choose one of {', '.join(choices)}")


def check_samples(method: Any, differ: bool) -> None:
    """Raise InputError for several samples that do not `differ`."""
    if method.num_samples > 1 and not differ:
        raise InputError(f"method.num_samples={method.num_samples} gives equal pictures: set sampler.eta above 0")


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
    """A latent (1, c, h, w) -> its picture (3, H, W) in [-1, 1], float32 on the CPU. Raises InputError where the
    picture is not finite."""
    image = model.decode_latents(latent)[0].float().cpu()
    if not image.isfinite().all():
        raise InputError("the edit is NaN or infinite: lower method.guidance_scale or learning rates, or dtype=float32")
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


class Descent:
    """Minimise a loss over `params`, in place: call `step` with the loss's terms, evaluated with gradients on.

    Parameters of less than 32 bits are optimised as float32 masters, since updates of 5e-7 would vanish in them.
    `lean` moves each parameter during the backward pass and frees its gradient at once; the result is the same.
    `curves` holds the loss at each step and, where there are several, its terms.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, optimizer: str, stage: str, run: Run, lean: bool = False):
        self.params = [param.requires_grad_() for param in params]
        self.stage, self.run, self.lean = stage, run, lean
        self.curves: dict[str, list[float]] = {"loss": []}
        masters = [p.detach() if p.dtype == torch.float32 else p.detach().float() for p in self.params]
        pairs = list(zip(self.params, masters, strict=True))
        groups = [[pair] for pair in pairs] if lean else [pairs]  # one call for all is faster than one for each
        self.updates = [partial(update, OPTIMIZERS[optimizer]([m for _, m in group], lr), group) for group in groups]

    def step(self, **terms: Tensor) -> None:
        """Move the parameters against the gradient of the sum of `terms`. Raises InputError, before a parameter has
        moved, if the sum is NaN or infinite."""
        loss, step = sum(terms.values()), len(self.curves["loss"])
        values = {"loss": loss, **terms} if len(terms) > 1 else {"loss": loss}
        values = {name: float(value.detach()) for name, value in values.items()}
        if not math.isfinite(values["loss"]):
            where = f"in stage '{self.stage}' at step {step}"
            raise InputError(f"the loss became {values['loss']} {where}: lower its learning rate")
        for name, value in values.items():
            self.curves.setdefault(name, []).append(value)
        self.run.scalar(self.stage, step, **values)
        if not self.lean:
            loss.backward()
            return self.updates[0]()
        pairs = zip(self.params, self.updates, strict=True)
        hooks = [param.register_post_accumulate_grad_hook(lambda _, move=move: move()) for param, move in pairs]
        try:
            loss.backward()
        finally:
            for hook in hooks:
                hook.remove()


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
    run: Run, stage: str, key: dict, build: Callable[[], tuple[dict[str, Tensor], dict[str, list[float] | Tensor]]]
) -> dict[str, Tensor]:
    """The tensors that `build` gives for `stage`, through `run.cached`. The curves, which it gives beside them, are
    stored with the tensors and drawn again on a hit; the mean of the loss's last tenth becomes a metric."""
    fresh = []

    def build_and_draw() -> dict[str, Tensor]:
        fresh.append(stage)
        tensors, curves = build()
        stored = {f"curve/{name}": torch.as_tensor(curve) for name, curve in curves.items()}
        return stored | {name: tensor.detach().contiguous() for name, tensor in tensors.items()}

    state = dict(run.cached(stage, key, build_and_draw))
    curves = {name.removeprefix("curve/"): state.pop(name).tolist() for name in list(state) if "curve/" in name}
    for step, values in enumerate([] if fresh else zip(*curves.values(), strict=True)):
        run.scalar(stage, step, **dict(zip(curves, values, strict=True)))
    if loss := curves.get("loss"):
        last = loss[-max(1, len(loss) // 10) :]
        run.metrics[f"{stage}_loss"] = sum(last) / len(last)
    return state
