"""Forced replay: a pipeline's steps answered with recorded actions, and the wanted ones shown with their graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tiller.kernels import Stock
from tiller.policy.bridge import Gates
from tiller.policy.carried import cut, frozen, module_of, moment, since
from tiller.policy.recorder import Template
from tiller.policy.rollout import Record, Rollout, Step
from tiller.policy.seam import StepCall, with_first
from tiller.policy.transition import restore, rows, transition
from tiller.process import Stage
from tiller.types import PipelineError


class Finished(BaseException):
    """Leaves a pipeline in the middle of its loop, once everything wanted has been seen."""


class Replayer:
    """Answers a pipeline's steps with recorded actions, and shows the wanted ones to a callback with their graph."""

    def __init__(
        self,
        rollout: Rollout,
        on_step: Callable[[Step], None],
        steps: Sequence[int],
        path: Callable[[int], Tensor] | None = None,
        pipeline: str = "this pipeline",
    ):
        self.rollout, self.on_step, self.steps, self.path = rollout, on_step, frozenset(steps), path
        self.pipeline, self.grad = pipeline, torch.is_grad_enabled()
        self.index = self.calls = 0
        self.last = max(self.steps)
        calls = sorted({index for index, _, _ in rollout.forwards})
        self.source = {step: max((c for c in calls if c <= step), default=step) for step in range(len(rollout.records))}
        self.needed = {self.source[step] for step in self.steps}
        self.waiting = list(rollout.forwards)
        self.has_graph = False  # the denoiser's last output had one
        self.gates = Gates()
        self.began = moment()  # this step
        self.writes = len(calls) < len(rollout.records)  # several steps on one call: latents are written piece by piece

    def forward(self, name: str) -> Callable[..., Any]:
        """A handler for the forwards of module `name`: real where a wanted step needs it, a stand-in elsewhere."""

        def run(own_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            number = len(self.rollout.forwards) - len(self.waiting)
            _, _, template = self.waiting.pop(0)
            if number in self.rollout.guiding:
                with frozen(module_of(own_forward)), torch.enable_grad():
                    return own_forward(*args, **kwargs)
            needed = self.index in self.needed
            if not needed and template is not None:
                return pytree.tree_map_only(Template, Template.tensor, template)
            if template is None:
                cut((args, kwargs))
            args, kwargs = pytree.tree_map_only(Tensor, self._input, (args, kwargs))
            with torch.set_grad_enabled(needed and self.grad):
                output = own_forward(*args, **kwargs)
            if not needed:
                return output
            self.gates.begin(self.index, self.began)
            self.has_graph = any(t.requires_grad for t in pytree.tree_leaves(output) if isinstance(t, Tensor))
            return pytree.tree_map_only(Tensor, self.gates.through, output)

        return run

    def _input(self, tensor: Tensor) -> Tensor:
        """What the model is to see: of no earlier step's graph, and safe from a pipeline that writes in place."""
        if tensor.requires_grad:
            tensor = since(tensor, self.began)
        return tensor.clone() if self.writes and tensor.is_floating_point() else tensor

    def step(self, call: StepCall) -> Any:
        self.calls += 1
        if self.calls - 1 in self.rollout.asides:
            with torch.set_grad_enabled(self.index in self.steps and self.grad):
                return call.solve(call.output, call.sample)
        index, record = self.index, self.rollout.records[self.index]
        if index or self.path is None:  # a forced path starts from fresh noise, which is at hand already
            call.sample = self._state(index).to(call.sample.device)
        wanted = index in self.steps
        if wanted and self.has_graph:
            call.output = self.gates.alone(call.output)
        if wanted and self.has_graph and not call.output.requires_grad:
            raise PipelineError(
                f"no gradient reaches the denoiser of {self.pipeline} at step {index}: its loop cuts the graph between "
                "the denoiser and scheduler.step; use another pipeline of the same model."
            )
        if wanted and record.memory is not None:  # of steps at which no denoiser may have run
            known, history = record.memory
            restore(call.scheduler, known)
            call.with_history(history)
        with torch.set_grad_enabled(wanted and self.grad and isinstance(record.kernel, Stock)):
            answer, gaussian, stage = transition(record.kernel, call, lazy=True)
        cut(vars(call.scheduler))
        if wanted:
            self.on_step(self._show(index, record, call, stage, gaussian))
        if index == self.last:
            raise Finished
        self.index += 1
        self.began = moment()
        forced = self._state(self.index) if self._forced(self.index) else record.action
        return with_first(answer, forced.clone())  # pipelines may write into it

    def _show(self, index: int, record: Record, call: StepCall, stage: Stage | None, gaussian: Any) -> Step:
        return Step(
            index=index,
            timestep=record.timestep,
            sample=call.sample.float(),
            action=record.action.to(call.sample.device).float(),
            prediction=call.output,
            stage=stage,
            batch_size=rows(record.action, self.rollout.batch_size),
            old_log_prob=record.log_prob,
            old_mean=record.mean,
            shared=any(later > index and self.source[later] == self.source[index] for later in self.steps),
            _transition=gaussian,
        )

    def _forced(self, index: int) -> bool:
        return self.path is not None and index in self.steps

    def _state(self, index: int) -> Tensor:
        """The latents at `index`: recorded, or those of the forced path."""
        recorded = self.rollout.records[index].sample
        if self._forced(index):
            assert self.path is not None
            return self.path(index).to(recorded)
        return recorded
