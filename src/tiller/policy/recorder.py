"""Record and forced replay: the two ways to answer `scheduler.step`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tiller.kernels import DDIM, FlowSDE, Gaussian, Kernel, Stock, log_prob
from tiller.policy.noise import standard_normal
from tiller.policy.rollout import Record, Rollout, Step
from tiller.policy.seam import PROBE, StepCall, first, with_first
from tiller.process import Stage, read
from tiller.types import PipelineError


class Finished(BaseException):
    """Leaves a pipeline in the middle of its loop, once everything wanted has been seen."""


class Recorder:
    """Answers a pipeline's steps with actions drawn from the kernel, and writes them down."""

    def __init__(self, kernel: Kernel | None, batch_size: int, noise: Sequence[torch.Generator]):
        self.kernel, self.batch_size, self.noise = kernel, batch_size, noise
        self.kernels: dict[str, Kernel] = {}  # by scheduler class: pipelines may hold several
        self.records: list[Record] = []
        self.forwards: list[tuple[int, str, Any]] = []

    def forward(self, name: str) -> Callable[..., Any]:
        """A handler for the forwards of module `name` that notes when it ran and what its output looks like."""

        def run(own_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            output = own_forward(*args, **kwargs)
            self.forwards.append((len(self.records), name, pytree.tree_map_only(Tensor, _template, output)))
            return output

        return run

    def step(self, call: StepCall) -> Any:
        if not call.sample.is_floating_point():
            raise PipelineError(
                f"{type(call.scheduler).__name__} steps through discrete tokens; only Gaussian transitions can be trained."
            )
        if self.kernel is not None and self.kernel.deterministic:
            answer = call.solve(call.output, call.sample)
            return self._write(call, answer, first(answer), None, self.kernel)
        kind = type(call.scheduler).__name__
        if kind not in self.kernels:
            self.kernels[kind] = _meet(call, self.kernel)
        kernel = self.kernels[kind]
        answer, gaussian, _ = transition(kernel, call)
        if not gaussian.has_density:
            return self._write(call, answer, gaussian.mean.to(_storage(call, answer)), None, kernel)
        action = gaussian.mean + gaussian.std * standard_normal(gaussian.mean, self.noise)
        return self._write(call, answer, action.to(_storage(call, answer)), gaussian, kernel)

    def _write(self, call: StepCall, answer: Any, action: Tensor, gaussian: Gaussian | None, kernel: Kernel) -> Any:
        score = None if gaussian is None else log_prob(action, gaussian, rows(action, self.batch_size))
        std = None if gaussian is None else float(torch.as_tensor(gaussian.std).mean())
        timestep = float(torch.as_tensor(call.timestep).flatten()[0])
        self.records.append(Record(timestep, call.sample, action, kernel, score, std))
        return with_first(answer, action)


class Replayer:
    """Answers a pipeline's steps with recorded actions, and shows the wanted ones to a callback with their graph."""

    def __init__(
        self,
        rollout: Rollout,
        on_step: Callable[[Step], None],
        steps: Sequence[int],
        path: Callable[[int], Tensor] | None = None,
    ):
        self.rollout, self.on_step, self.steps, self.path = rollout, on_step, frozenset(steps), path
        self.index = 0
        self.last = max(self.steps)
        calls = sorted({index for index, _, _ in rollout.forwards})
        self.source = {step: max((c for c in calls if c <= step), default=step) for step in range(len(rollout.records))}
        self.needed = {self.source[step] for step in self.steps}
        self.waiting = list(rollout.forwards)

    def forward(self, name: str) -> Callable[..., Any]:
        """A handler for the forwards of module `name`: real where a wanted step needs it, a stand-in elsewhere."""

        def run(own_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            _, _, template = self.waiting.pop(0)
            if self.index in self.needed:
                return own_forward(*args, **kwargs)
            return pytree.tree_map_only(_Template, _Template.tensor, template)

        return run

    def step(self, call: StepCall) -> Any:
        index, record = self.index, self.rollout.records[self.index]
        call.sample = self._state(index).to(call.sample.device)
        wanted = index in self.steps
        with torch.set_grad_enabled(wanted and isinstance(record.kernel, Stock)):
            answer, gaussian, stage = transition(record.kernel, call, lazy=True)
        _cut_graph(call.scheduler)
        if wanted:
            self.on_step(self._show(index, record, call, stage, gaussian))
        if index == self.last:
            raise Finished
        self.index += 1
        return with_first(answer, self._state(self.index) if self._forced(self.index) else record.action)

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
            shared=any(later > index and self.source[later] == self.source[index] for later in self.steps),
            _transition=gaussian,
        )

    def _forced(self, index: int) -> bool:
        return self.path is not None and index in self.steps

    def _state(self, index: int) -> Tensor:
        """The latents at `index`: recorded, or those of the forced path (the very first are always the recorded ones)."""
        recorded = self.rollout.records[index].sample
        if index and self._forced(index):
            assert self.path is not None
            return self.path(index).to(recorded)
        return recorded


def rows(latents: Tensor, batch_size: int) -> int:
    """By how many rows latents are to be scored: the batch size, unless the first axis does not hold the samples."""
    return batch_size if len(latents) % batch_size == 0 else 1


def transition(kernel: Kernel, call: StepCall, lazy: bool = False) -> tuple[Any, Any, Stage | None]:
    """The scheduler's own answer, the Gaussian of the transition, and how the scheduler was read.

    The answer is always asked for: it moves the scheduler's state on, and holds what else the pipeline may want of it.
    With `lazy` the Gaussian comes as a function, so that nothing is computed which a loss does not ask for.
    """
    output, sample = call.output, call.sample
    if isinstance(kernel, Stock):
        answer, own = _own_gaussian(call)
        return answer, (lambda: own) if lazy else own, read(call.scheduler, call.timestep, call.denoised)
    with torch.no_grad():
        answer = call.solve(output.detach(), sample.detach())
    stage = read(call.scheduler, call.timestep, call.denoised)
    if lazy and not kernel.deterministic:
        return answer, lambda: _gaussian(kernel, stage, output, sample), stage
    gaussian = Gaussian(first(answer), 0.0) if kernel.deterministic else _gaussian(kernel, stage, output, sample)
    return answer, (lambda: gaussian) if lazy else gaussian, stage


def _own_gaussian(call: StepCall) -> tuple[Any, Gaussian]:
    """The scheduler's own answer without noise, and its own transition, in float32.

    Every scheduler adds its noise linearly, so two answers, one without noise and one with a constant in its place,
    give mean and standard deviation; a learned variance keeps its graph.
    """
    before = _state(call.scheduler)
    exact = call.output.float(), call.sample.float()
    shifted, drew = call.solve_with_noise(*exact, size=PROBE)
    _restore(call.scheduler, before)
    answer, _ = call.solve_with_noise(*exact, size=0.0)
    mean = first(answer)
    std = _scalar((first(shifted) - mean) / PROBE) if drew else 0.0
    detached = pytree.tree_map_only(Tensor, lambda t: t.detach().to(call.sample.dtype), answer)
    return detached, Gaussian(mean, std)


def _gaussian(kernel: Kernel, stage: Stage | None, output: Tensor, sample: Tensor) -> Gaussian:
    """The kernel's transition in float32, whatever autocast or storage type is in force."""
    if stage is None:
        raise PipelineError(
            f"{type(kernel).__name__} does not know this pipeline's scheduler; use the kernel Stock or another scheduler."
        )
    with torch.autocast(output.device.type, enabled=False):
        x = sample.float()
        x0, eps = stage.split(x, output.float())
        return kernel.transition(x, x0, eps, stage.now, stage.then)


def _meet(call: StepCall, asked: Kernel | None) -> Kernel:
    """The kernel to use with this scheduler; its state is left as it was.

    Without a kernel asked for: the scheduler's own randomness where it has any, else DDPM-like noise, or Flow-GRPO's
    for flow models. Our reading of a deterministic scheduler must agree with its own first step, where all solvers
    are of first order.
    """
    before = _state(call.scheduler)
    _, own = _own_gaussian(call)
    stage = read(call.scheduler, call.timestep, call.denoised)
    _restore(call.scheduler, before)
    name = type(call.scheduler).__name__
    if isinstance(asked, Stock) or (asked is None and own.has_density):
        return Stock()
    if stage is None:
        raise PipelineError(
            f"{name} is of no family that tiller can add noise to; put another scheduler into the pipeline, for example "
            "DDIMScheduler or FlowMatchEulerDiscreteScheduler."
        )
    if not own.has_density:
        error = float((_gaussian(DDIM(eta=0.0), stage, call.output, call.sample).mean - own.mean).abs().max())
        if not error <= 1e-3 * float(own.mean.abs().max()):
            raise PipelineError(
                f"{name} does not step as its family does (its first step differs by {error:.2g}); put another scheduler "
                "into the pipeline, for example DDIMScheduler or FlowMatchEulerDiscreteScheduler."
            )
    return asked or (FlowSDE() if stage.prediction == "flow" else DDIM(eta=1.0))


def _storage(call: StepCall, answer: Any) -> torch.dtype:
    """The type latents are kept in: the scheduler's, or under autocast, which would round them, the state's."""
    under_autocast = torch.is_autocast_enabled(call.sample.device.type)
    return call.sample.dtype if under_autocast else first(answer).dtype


def _scalar(std: float | Tensor) -> float | Tensor:
    """One number where all elements agree to rounding, which is exact for every scheduler with a fixed variance."""
    if not isinstance(std, Tensor):
        return std
    middle = std.detach().median()
    constant = float((std.detach() - middle).abs().max()) <= 1e-4 * float(middle.abs()) + 1e-12
    return float(middle) if constant else std


def _state(scheduler: Any) -> dict[str, Any]:
    """A scheduler's attributes, with its lists copied one level deep: multistep solvers shift them in place."""
    return {name: list(value) if isinstance(value, list) else value for name, value in vars(scheduler).items()}


def _restore(scheduler: Any, state: dict[str, Any]) -> None:
    vars(scheduler).clear()
    vars(scheduler).update(state)


def _cut_graph(scheduler: Any) -> None:
    """Multistep solvers keep earlier outputs; those belong to the state, not to the gradient of a later step."""
    for name, value in vars(scheduler).items():
        if isinstance(value, Tensor) and value.requires_grad:
            setattr(scheduler, name, value.detach())
        elif isinstance(value, list):
            setattr(scheduler, name, [v.detach() if isinstance(v, Tensor) else v for v in value])


class _Template:
    """Shape, type and device of a tensor that need not be kept."""

    def __init__(self, like: Tensor):
        self.shape, self.dtype, self.device = like.shape, like.dtype, like.device

    def tensor(self) -> Tensor:
        """A stand-in that takes no memory."""
        return torch.zeros((), dtype=self.dtype, device=self.device).expand(self.shape)


def _template(tensor: Tensor) -> _Template:
    return _Template(tensor)
