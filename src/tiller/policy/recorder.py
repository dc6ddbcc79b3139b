"""Recording: a pipeline's steps answered with actions drawn from a kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tiller.kernels import Gaussian, Kernel, Stock, Window, log_prob
from tiller.policy.carried import Carried, frozen, module_of
from tiller.policy.noise import standard_normal
from tiller.policy.rollout import Record
from tiller.policy.seam import StepCall, first, with_first
from tiller.policy.taint import Taint, mark, marked
from tiller.policy.transition import meet, rows, stage_of, state, storage, transition
from tiller.process import Stage
from tiller.types import PipelineError


class Recorder:
    """Answers a pipeline's steps with actions drawn from the kernel, and writes them down."""

    def __init__(
        self, kernel: Kernel | None, batch_size: int, noise: Sequence[torch.Generator], keep_means: bool = False
    ):
        self.kernel, self.batch_size, self.noise, self.keep_means = kernel, batch_size, noise, keep_means
        self.kernels: dict[str, Kernel] = {}  # by scheduler class: pipelines may hold several
        self.records: list[Record] = []
        self.forwards: list[tuple[int, str, Any]] = []
        self.asides: set[int] = set()
        self.calls = 0  # of scheduler.step
        self.positions: dict[int, int | None] = {}  # by scheduler: its step index before its last step
        self.carried = Carried()
        self.guiding: set[int] = set()  # forwards whose gradient the pipeline itself takes
        self.taint = Taint()
        self.momentum = False  # a prediction hung on an earlier step's output
        self.memory: Any = None
        self.handed: tuple[Tensor, int] | None = None  # the last action as the pipeline got it, and its version

    def forward(self, name: str) -> Callable[..., Any]:
        """A handler for the forwards of module `name` that notes when it ran and what its output looks like."""

        def run(own_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            step, module = len(self.records), module_of(own_forward)
            guiding = torch.is_grad_enabled()  # the pipeline has switched gradients on, for guidance of its own
            if guiding:
                self.guiding.add(len(self.forwards))
            with (
                self.taint.off(),
                self.carried.watched(name, step, (args, kwargs), module) as leave,
                frozen(module if guiding else None),
            ):
                output = own_forward(*args, **kwargs)
                leave(output)
                mark(output, step)
            self.forwards.append((step, name, pytree.tree_map_only(Tensor, Template, output)))
            return output

        return run

    def finished_forwards(self) -> tuple[tuple[int, str, Any], ...]:
        """Every forward in order; no template for those that a step which is not wanted must run all the same."""
        everything = self.momentum
        return tuple(
            (step, name, None if everything or name in self.carried.names or number in self.guiding else template)
            for number, (step, name, template) in enumerate(self.forwards)
        )

    def step(self, call: StepCall) -> Any:
        with self.taint.off():
            origin = marked(call.output)
            self.momentum |= origin is not None and origin < self.forwards[-1][0]
            return self._answer(call)

    def _answer(self, call: StepCall) -> Any:
        if not call.sample.is_floating_point():
            raise PipelineError(
                f"{type(call.scheduler).__name__} steps through discrete tokens; only Gaussian transitions can be "
                "trained, so use a pipeline that denoises continuous latents."
            )
        self._withdraw_repeated(call)
        self.calls += 1
        kernel = self._kernel(call)
        solves = isinstance(kernel, Stock) or kernel.deterministic
        self.memory = (state(call.scheduler), call.history) if solves else None
        if kernel.deterministic:
            answer = call.solve(call.output, call.sample)
            return self._write(call, answer, first(answer), None, kernel, stage_of(call))
        answer, gaussian, stage = transition(kernel, call)
        if not gaussian.has_density:
            return self._write(call, answer, gaussian.mean.to(storage(call, answer)), None, kernel, stage)
        action = gaussian.mean + gaussian.std * standard_normal(gaussian.mean, self.noise)
        return self._write(call, answer, action.to(storage(call, answer)), gaussian, kernel, stage)

    def _kernel(self, call: StepCall) -> Kernel:
        """What this step is drawn with."""
        here = self.kernel.at(len(self.records)) if isinstance(self.kernel, Window) else self.kernel
        if here is not None and here.deterministic:
            return here
        kind = type(call.scheduler).__name__
        if kind not in self.kernels:
            self.kernels[kind] = meet(call, here)
        return self.kernels[kind]

    def _withdraw_repeated(self, call: StepCall) -> None:
        """A pipeline that turns the scheduler's index back (Cosmos) has not stepped: it asked for x̂0 only."""
        before = self.positions.get(id(call.scheduler), -1)
        self.positions[id(call.scheduler)] = call.position
        if self.records and call.position is not None and (before or 0) == call.position and before != -1:
            self.records.pop()
            self.asides.add(self.calls - 1)
            self.forwards = [(min(step, len(self.records)), name, output) for step, name, output in self.forwards]

    def _write(
        self,
        call: StepCall,
        answer: Any,
        action: Tensor,
        gaussian: Gaussian | None,
        kernel: Kernel,
        stage: Stage | None,
    ) -> Any:
        score = None if gaussian is None else log_prob(action, gaussian, rows(action, self.batch_size))
        std = None if gaussian is None else float(torch.as_tensor(gaussian.std).mean())
        sample = self._kept(call.sample)
        mean = gaussian.mean if gaussian is not None and self.keep_means else None
        self.records.append(Record(call.timestep, sample, action.clone(), kernel, score, std, stage, mean, self.memory))
        self.handed = (action, action._version)
        return with_first(answer, action)

    def _kept(self, sample: Tensor) -> Tensor:
        """A copy of the state, which pipelines may change in place; the last action's own where it is just that."""
        if self.handed is not None and sample is self.handed[0] and sample._version == self.handed[1]:
            return self.records[-1].action
        return sample.clone()


class Template:
    """Shape, type and device of a tensor that need not be kept."""

    def __init__(self, like: Tensor):
        self.shape, self.dtype, self.device = like.shape, like.dtype, like.device

    def tensor(self) -> Tensor:
        """A stand-in that takes no memory."""
        return torch.zeros((), dtype=self.dtype, device=self.device).expand(self.shape)
