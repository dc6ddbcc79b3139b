"""The graph of one step alone, where a pipeline mixes its models' outputs of several steps (momentum of guidance)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge


class Gates:
    """What a step's models gave to the pipeline: its graph begins there, and what is older is cut off."""

    def __init__(self) -> None:
        self.step = -1
        self._start = 0  # moment at which the step began
        self._outputs: dict[Any, tuple[Tensor, GradientEdge]] = {}  # by the node of the copy the pipeline got

    def begin(self, step: int, start: int) -> None:
        """A model is called in this step; outputs of earlier steps no longer count."""
        if step != self.step:
            self.step, self._start, self._outputs = step, start, {}

    def through(self, output: Tensor) -> Tensor:
        """A model's output as the pipeline is to get it: a copy, which it may change in place."""
        if not output.requires_grad:
            return output
        copy = output.clone()
        edge = get_gradient_edge(copy)
        self._outputs[edge.node] = (output, edge)
        return copy

    def alone(self, prediction: Tensor) -> Tensor:
        """The prediction with the graph of this step only; detached where none of it is this step's."""
        if not prediction.requires_grad:
            return prediction
        mine, older = self._reached(prediction)
        if not older:
            return prediction
        if not mine:
            return prediction.detach()
        outputs, edges = zip(*(self._outputs[node] for node in mine), strict=True)
        bridged: Tensor = _Bridge.apply((prediction,), edges, *outputs)
        return bridged

    def _reached(self, prediction: Tensor) -> tuple[list[Any], bool]:
        """The nodes of this step's outputs that a prediction hangs on, and whether it hangs on older ones too."""
        waiting: list[Any] = [prediction.grad_fn]
        seen: set[Any] = set()
        mine, older = [], False
        while waiting:
            node = waiting.pop()
            if node is None or node in seen or type(node).__name__ == "AccumulateGrad":
                continue
            seen.add(node)
            if node in self._outputs:
                mine.append(node)
            elif node._sequence_nr() < self._start:
                older = True
            else:
                waiting += [earlier for earlier, _ in node.next_functions]
        return mine, older


class _Bridge(torch.autograd.Function):
    """A prediction whose gradient goes to some model outputs and nowhere else.

    Autograd is asked for the gradient of these outputs only, so it never enters an older step's graph, whose buffers
    are freed.
    """

    @staticmethod
    def forward(ctx: Any, held: tuple[Tensor], edges: tuple[GradientEdge, ...], *outputs: Tensor) -> Tensor:
        ctx.prediction, ctx.edges = held[0], edges
        return held[0].detach().clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        inner = torch.autograd.grad(ctx.prediction, ctx.edges, gradients, retain_graph=True, allow_unused=True)
        return None, None, *inner
