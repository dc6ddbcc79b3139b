"""The last steps of a rollout taken live: the graph runs from the trained weights through them into the picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tiller.policy import noise
from tiller.policy.carried import cut
from tiller.policy.recorder import Template
from tiller.policy.rollout import Rollout
from tiller.policy.seam import StepCall, with_first
from tiller.policy.transition import restore, storage, transition
from tiller.types import PipelineError


class Unroller:
    """Answers steps before `start` with recorded actions, and the later ones live, on the recorded noise.

    With `stop` the path ends there: the picture is decoded from x̂0 as the model sees it at step `stop - 1`
    (ReFL). With `state` the latents at step `start` are these in place of the recorded ones.
    """

    def __init__(self, rollout: Rollout, start: int, stop: int | None, state: Tensor | None):
        self.rollout, self.start, self.state = rollout, start, state
        self.stop = len(rollout.records) if stop is None else stop
        self.early = stop is not None
        self.index = self.calls = 0
        self.waiting = list(rollout.forwards)
        self.noise = noise.generators("steps", rollout.seed, rollout.prompts, rollout.samples)
        self.denoised: Tensor | None = None  # x̂0, once the path has ended early

    def forward(self, name: str) -> Callable[..., Any]:
        """A handler for the forwards of module `name`: real in the live steps, a stand-in elsewhere."""

        def run(own_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            _, _, template = self.waiting.pop(0)
            live = self.start <= self.index < self.stop
            if not live and template is not None:
                return pytree.tree_map_only(Template, Template.tensor, template)
            with torch.set_grad_enabled(live):
                return own_forward(*args, **kwargs)

        return run

    def step(self, call: StepCall) -> Any:
        self.calls += 1
        if self.calls - 1 in self.rollout.asides:
            return call.solve(call.output, call.sample)
        index, self.index = self.index, self.index + 1
        record = self.rollout.records[index]
        z = noise.standard_normal(record.action, self.noise) if record.log_prob is not None else None
        if index < self.start or self.denoised is not None:
            with torch.no_grad():
                answer = call.solve(call.output.detach(), call.sample.detach())
            cut(vars(call.scheduler))
            return with_first(answer, self._forced(index, call))
        if record.memory is not None:  # of steps at which no denoiser has run
            known, history = record.memory
            if index == self.start:
                restore(call.scheduler, known)
                call.with_history(history)
        if record.kernel.deterministic and not self._ends(index):
            return call.solve(call.output, call.sample)
        answer, gaussian, stage = transition(record.kernel, call, lazy=True, graph=True)
        if self._ends(index):
            if stage is None:
                raise PipelineError(
                    f"{type(call.scheduler).__name__} is of no family whose denoised prediction tiller can read; put "
                    "another scheduler into the pipeline, for example DDIMScheduler or FlowMatchEulerDiscreteScheduler."
                )
            self.denoised, _ = stage.split(call.sample.float(), call.output.float())
            return with_first(answer, self.denoised.to(storage(call, answer)))
        drawn = gaussian().mean if z is None else gaussian().mean + gaussian().std * z.to(call.sample.device)
        return with_first(answer, drawn.to(storage(call, answer)))

    def _ends(self, index: int) -> bool:
        return self.early and index == self.stop - 1

    def _forced(self, index: int, call: StepCall) -> Tensor:
        """What follows a step that is not live: the recorded action, the state asked for, or x̂0 to the end."""
        action = self.rollout.records[index].action
        if self.denoised is not None:
            return self.denoised.to(action.dtype)
        if self.state is not None and index == self.start - 1:
            return self.state.to(action).clone()  # pipelines may write into it
        return action.clone()
