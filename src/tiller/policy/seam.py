"""The seam: standing in `scheduler.step` of every scheduler of a pipeline, for the length of one call.

Nothing of the pipeline is copied or re-typed. A scheduler keeps its instance and all of its attributes; only its class
is exchanged for a subclass whose `step` asks a handler. Copies that a pipeline makes of its scheduler are caught too.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

from tiller.types import PipelineError

PROBE = 1024.0  # size of the noise that reads off a standard deviation: large, for the sake of rounding
DISCRETE = (  # schedulers that draw tokens
    "AmusedScheduler",
    "BlockRefinementScheduler",
    "DiscreteDDIMScheduler",
    "EntropyBoundScheduler",
    "VQDiffusionScheduler",
)


class StepCall:
    """One call of `scheduler.step`: its arguments by name, and the scheduler's own answer to them."""

    def __init__(self, scheduler: Any, own_step: Callable[..., Any], arguments: inspect.BoundArguments):
        self.scheduler, self._step, self._arguments = scheduler, own_step, arguments
        given = arguments.arguments
        if not isinstance(given.get("model_output"), Tensor) or not isinstance(given.get("sample"), Tensor):
            raise PipelineError(
                f"{type(scheduler).__name__}.step takes no `model_output` and `sample`, which every step of a pipeline "
                "that tiller trains must have; put another scheduler into the pipeline, for example DDIMScheduler."
            )
        self.output: Tensor = given["model_output"]
        self.sample: Tensor = given["sample"]
        self.timestep = float(torch.as_tensor(given.get("timestep", 0)).flatten()[0])
        self.denoised: Tensor | None = given.get("pred_original_sample")
        self.per_token: Tensor | None = given.get("per_token_timesteps")
        self.position: int | None = getattr(scheduler, "_step_index", None)  # before the step
        self.may_draw = "generator" in arguments.signature.parameters

    @property
    def history(self) -> dict[str, Tensor]:
        """What the pipeline hands back to the scheduler of its earlier steps (CogVideoX's DPM solver)."""
        given = self._arguments.arguments
        return {name: value for name, value in given.items() if name.startswith("old_") and isinstance(value, Tensor)}

    def with_history(self, history: dict[str, Tensor]) -> None:
        """Put such tensors in the place of those given."""
        self._arguments.arguments.update(history)

    def solve(self, output: Tensor, sample: Tensor) -> Any:
        """What the scheduler itself returns; its state moves on by one step."""
        arguments = {**self._arguments.arguments, "model_output": output, "sample": sample}
        rest = arguments.pop("kwargs", {})
        arguments.pop("self")
        return self._step(self.scheduler, **arguments, **rest)

    def solve_with_noise(self, output: Tensor, sample: Tensor, size: float) -> tuple[Any, bool]:
        """The scheduler's answer with every random number it draws set to `size`, and whether it drew any.

        Noise that the pipeline hands over itself (CycleDiffusion) is exchanged too.
        """
        drawn: list[Any] = []
        given = self._arguments.arguments

        def constant(shape: Any, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Tensor:
            drawn.append(shape)
            return torch.full(tuple(shape), size, dtype=dtype or output.dtype, device=output.device)

        with ExitStack() as stack:
            for parent in type(self.scheduler).__mro__:
                module = sys.modules.get(parent.__module__)
                if hasattr(module, "randn_tensor"):
                    stack.enter_context(attribute(module, "randn_tensor", constant))
            if hasattr(self.scheduler, "noise_sampler"):  # Brownian paths
                stack.enter_context(
                    attribute(self.scheduler, "noise_sampler", lambda *_: constant(sample.shape, dtype=sample.dtype))
                )
            if given.get("variance_noise") is not None:
                noise = constant(sample.shape, dtype=sample.dtype)
                stack.enter_context(_entry(given, "variance_noise", noise))
            return self.solve(output, sample), bool(drawn)


@contextmanager
def _entry(arguments: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    before = arguments[name]
    arguments[name] = value
    try:
        yield
    finally:
        arguments[name] = before


def first(answer: Any) -> Tensor:
    """The next latents in a scheduler's answer: the first of a tuple, or of an output dataclass."""
    return answer[0]


def with_first(answer: Any, action: Tensor) -> Any:
    """The same answer with other latents in the first place."""
    if isinstance(answer, tuple) and not hasattr(answer, "_fields"):
        return (action, *answer[1:])
    fields = dict(answer)
    return type(answer)(**{**fields, next(iter(fields)): action})


def pipelines(pipe: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
    """The pipeline, and the pipelines it holds (combined pipelines), each once."""
    seen: set[int] = set()
    waiting = [pipe]
    while waiting:
        pipeline = waiting.pop()
        if id(pipeline) not in seen:
            seen.add(id(pipeline))
            yield pipeline
            waiting += [value for value in vars(pipeline).values() if isinstance(value, DiffusionPipeline)]


def parts(pipe: DiffusionPipeline, kind: type | tuple[type, ...]) -> dict[str, Any]:
    """All parts of one kind by attribute name, over nested pipelines too, each object once."""
    found: dict[str, Any] = {}
    for pipeline in pipelines(pipe):
        for name, value in vars(pipeline).items():
            if isinstance(value, kind) and not any(value is other for other in found.values()):
                found[name if name not in found else f"{type(pipeline).__name__}.{name}"] = value
    return found


@contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name = value` for the length of the block; afterwards it is exactly as before."""
    own = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextmanager
def subclassed(instance: Any, **methods: Callable[..., Any]) -> Iterator[None]:
    """`instance` with some methods exchanged, seen by its copies as well; its class goes by the same name.

    It also equals the class it stands for: Bria asks for `type(self.scheduler) != FlowMatchEulerDiscreteScheduler`.
    """
    cls = type(instance)
    namespace = {**methods, "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    instance.__class__ = _stand_in(type(cls))(cls.__name__, (cls,), namespace)
    try:
        yield
    finally:
        instance.__class__ = cls


def _stand_in(kind: Any) -> Any:
    """A metaclass whose classes equal their parents."""
    return type(
        kind.__name__,
        (kind,),
        {
            "__eq__": lambda cls, other: cls is other or cls.__base__ is other,
            "__hash__": lambda cls: hash(cls.__base__),
        },
    )


@contextmanager
def step_handled(scheduler: Any, handler: Callable[[StepCall], Any]) -> Iterator[None]:
    """Every `step` of this scheduler, or of a copy of it, is answered by `handler`."""
    own_step = type(scheduler).step
    signature = inspect.signature(own_step)

    @functools.wraps(own_step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        return handler(StepCall(self, own_step, signature.bind(self, *args, **kwargs)))

    with subclassed(scheduler, step=step):
        yield


@contextmanager
def forward_handled(module: nn.Module, handler: Callable[..., Any]) -> Iterator[None]:
    """Every forward of this module is answered by `handler(own_forward, *args, **kwargs)`.

    Gradients are the trainer's: a pipeline that clears them in its loop (Attend-and-Excite) clears nothing.
    """
    own_forward = module.forward

    @functools.wraps(own_forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return handler(own_forward, *args, **kwargs)

    with attribute(module, "forward", forward), attribute(module, "zero_grad", lambda *_, **__: None):
        yield


@contextmanager
def differentiable(pipe: DiffusionPipeline) -> Iterator[None]:
    """The pipeline, and the ones inside it, with the `@torch.no_grad()` taken off their `__call__`."""
    with ExitStack() as stack:
        for pipeline in pipelines(pipe):
            stack.enter_context(subclassed(pipeline, __call__=inspect.unwrap(type(pipeline).__call__)))
        yield


def schedulers(pipe: DiffusionPipeline) -> dict[str, SchedulerMixin]:
    """The pipeline's schedulers by attribute name, each object once."""
    return {name: value for name, value in parts(pipe, object).items() if is_scheduler(value)}


def is_scheduler(value: Any) -> bool:
    """Whatever has `step` and `set_timesteps`."""
    return hasattr(value, "set_timesteps") and hasattr(value, "step") and not isinstance(value, (nn.Module, type))


def inspect_schedulers(pipe: DiffusionPipeline) -> None:
    """Refuse a pipeline without a scheduler, or with one that has no Gaussian steps."""
    found = schedulers(pipe)
    if not found:
        raise PipelineError(f"{type(pipe).__name__} has no scheduler, so there is no denoising loop to train.")
    for scheduler in found.values():
        name = type(scheduler).__name__
        if name in DISCRETE:
            raise PipelineError(
                f"{type(pipe).__name__} draws discrete tokens ({name}); only Gaussian transitions can be "
                "trained, so use a pipeline that denoises continuous latents."
            )
