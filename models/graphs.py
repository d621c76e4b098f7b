"""Replay a step of a network as one CUDA graph. In an eager step Python launches kernel after kernel, which on a fast
card takes longer than the kernels do (docs/speed.md)."""

from collections.abc import Callable
from types import MethodType

import torch
from torch import Tensor, nn


def captured(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record `work` as a CUDA graph: a function that runs it again, and the tensor that then holds its result."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # once outside: libraries choose their kernels at the first call
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph.replay, result


class StepGraph:
    """A network's forward pass that replays steps: `network.forward = StepGraph(network)`.

    A step is captured at the second call with the same projected text and shape, so that texts which serve once, such
    as those of null-text inversion, cost nothing. The latest step alone is kept, since a graph holds the memory of a
    step. Calls with gradients, with hooks or with a text that is not projected run eagerly. Weights may change, in
    place."""

    def __init__(self, network: nn.Module, capture: Callable = captured):
        self.network, self.capture = network, capture
        self.eager = MethodType(type(network).forward, network)  # also where one of these stands there already
        self.step = self.replay = None

    def __call__(self, x: Tensor, t: Tensor, context, *others) -> Tensor:
        if torch.is_grad_enabled() or isinstance(context, Tensor) or self.network.attention.hook is not None:
            return self.eager(x, t, context, *others)
        step = (id(context), x.shape, x.dtype, t.shape, others)
        if step != self.step:
            self.step, self.context, self.replay = step, context, None  # holds the text, so that its id stays its own
            return self.eager(x, t, context, *others)
        if self.replay is None:
            self.x, self.t = x.clone(), t.clone()
            self.replay, self.result = self.capture(lambda: self.eager(self.x, self.t, context, *others))
        self.x.copy_(x)
        self.t.copy_(t)
        self.replay()
        return self.result.clone()
