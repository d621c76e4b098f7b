"""Optimisation for methods: one loop over embeddings or weights, and the cache of its results."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from errors import InputError
from methods.base import Run


def adafactor(params: Sequence[Tensor], lr: float) -> torch.optim.Optimizer:
    """Adafactor (Shazeer & Stern, 2018, arXiv 1804.04235) without its first moment: of the second moment of a weight
    it keeps only the means over rows and over columns. `lr` is absolute, as Adam's: a step is about `lr` long."""
    from timm.optim.adafactor import Adafactor  # seconds to import

    return Adafactor(params, lr=lr, scale_parameter=False)


OPTIMIZERS = {"adam": lambda params, lr: torch.optim.Adam(params, lr=lr, fused=True), "adafactor": adafactor}


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
    """Move `params` in place against the gradient of the loss, and return its curve, and its terms' if several.

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
                raise InputError(f"{stage}: the loss is {values['loss']} at step {step}: lower its learning rate")
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
