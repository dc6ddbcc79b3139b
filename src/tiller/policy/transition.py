"""The transition at one call of `scheduler.step`: by a kernel, or read off the scheduler itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tiller.kernels import DDIM, FlowSDE, Gaussian, Kernel, Stock
from tiller.policy.seam import PROBE, StepCall, first
from tiller.process import Stage, read
from tiller.types import PipelineError


def rows(latents: Tensor, batch_size: int) -> int:
    """By how many rows latents are to be scored: the batch size, unless the first axis does not hold the samples."""
    return batch_size if len(latents) % batch_size == 0 else 1


def transition(
    kernel: Kernel, call: StepCall, lazy: bool = False, graph: bool = False
) -> tuple[Any, Any, Stage | None]:
    """The scheduler's own answer, the Gaussian of the transition, and how the scheduler was read.

    The answer is always asked for: it moves the scheduler's state on, and holds what else the pipeline may want of it.
    With `lazy` the Gaussian comes as a function, so that nothing is computed which a loss does not ask for. With
    `graph` the answer has one too: some pipelines decode what else is in it (latent consistency).
    """
    output, sample = call.output, call.sample
    if isinstance(kernel, Stock):
        answer, own = _own_gaussian(call, graph)
        return (
            answer,
            (lambda: own) if lazy else own,
            stage_of(call),
        )
    if graph:
        answer = call.solve(output, sample)
    else:
        with torch.no_grad():
            answer = call.solve(output.detach(), sample.detach())
    stage = stage_of(call)
    if lazy and not kernel.deterministic:
        return answer, lambda: _gaussian(kernel, stage, output, sample), stage
    gaussian = Gaussian(first(answer), 0.0) if kernel.deterministic else _gaussian(kernel, stage, output, sample)
    return answer, (lambda: gaussian) if lazy else gaussian, stage


def stage_of(call: StepCall) -> Stage | None:
    """How the scheduler that has just stepped is read."""
    return read(call.scheduler, call.timestep, call.denoised, call.per_token)


def _own_gaussian(call: StepCall, graph: bool = False) -> tuple[Any, Gaussian]:
    """The scheduler's own answer without noise, and its own transition, in float32.

    Every scheduler adds its noise linearly, so two answers, one without noise and one with a constant in its place,
    give mean and standard deviation; a learned variance keeps its graph.
    """
    before = state(call.scheduler)
    exact = call.output.float(), call.sample.float()
    shifted, drew = call.solve_with_noise(*exact, size=PROBE)
    restore(call.scheduler, before)
    answer, _ = call.solve_with_noise(*exact, size=0.0)
    mean = first(answer)
    std = _scalar((first(shifted) - mean) / PROBE) if drew else 0.0
    kept = pytree.tree_map_only(Tensor, lambda t: (t if graph else t.detach()).to(call.sample.dtype), answer)
    return kept, Gaussian(mean, std)


def _gaussian(kernel: Kernel, stage: Stage | None, output: Tensor, sample: Tensor) -> Gaussian:
    """The kernel's transition in float32, whatever autocast or storage type is in force."""
    if stage is None:
        raise PipelineError(
            f"{type(kernel).__name__} does not know this pipeline's scheduler; use the kernel Stock or another "
            "scheduler such as DDIMScheduler."
        )
    with torch.autocast(output.device.type, enabled=False):
        x = sample.float()
        if output.ndim > 1 and output.shape[1] == 2 * x.shape[1]:  # the other half is a learned variance
            output = output[:, : x.shape[1]]
        x0, eps = stage.split(x, output.float())
        return kernel.transition(x, x0, eps, stage.now, stage.then)


def meet(call: StepCall, asked: Kernel | None) -> Kernel:
    """The kernel to use with this scheduler; its state is left as it was.

    Without a kernel asked for: the scheduler's own randomness where it has any, else DDPM-like noise, or Flow-GRPO's
    for flow models. Our reading of a deterministic scheduler must agree with its own first step, where all solvers
    are of first order.
    """
    before = state(call.scheduler)
    _, own = _own_gaussian(call)
    stage = stage_of(call)
    restore(call.scheduler, before)
    name = type(call.scheduler).__name__
    if isinstance(asked, Stock) or (asked is None and own.has_density):
        return Stock()
    if stage is None and asked is None and call.may_draw:
        return Stock()  # it is random, but not at a last step such as this one
    if stage is None:
        raise PipelineError(
            f"{name} is of no family that tiller can add noise to; put another scheduler into the pipeline, for "
            "example DDIMScheduler or FlowMatchEulerDiscreteScheduler."
        )
    if not own.has_density:
        if bool((torch.as_tensor(own.std) > 0).any()):
            raise PipelineError(
                f"{name} adds noise to a part of the latents only, so its steps have no density; call the pipeline "
                "with eta=1.0, which adds noise everywhere."
            )
        moved = own.mean != call.sample  # conditioning frames may stand still
        ours = _gaussian(DDIM(eta=0.0), stage, call.output, call.sample).mean
        error = float(((ours - own.mean) * moved).abs().max())
        if not error <= 1e-3 * float(own.mean.abs().max()):
            raise PipelineError(
                f"{name} does not step as its family does (its first step differs by {error:.2g}); put another "
                "scheduler into the pipeline, for example DDIMScheduler or FlowMatchEulerDiscreteScheduler."
            )
    return asked or (FlowSDE() if stage.prediction == "flow" else DDIM(eta=1.0))


def _scalar(std: float | Tensor) -> float | Tensor:
    """One number where all elements agree to rounding, which is exact for every scheduler with a fixed variance."""
    if not isinstance(std, Tensor):
        return std
    middle = std.detach().median()
    constant = float((std.detach() - middle).abs().max()) <= 1e-4 * float(middle.abs()) + 1e-12
    return float(middle) if constant else std


def state(scheduler: Any) -> dict[str, Any]:
    """A scheduler's attributes, with its lists copied one level deep: multistep solvers shift them in place."""
    return {name: list(value) if isinstance(value, list) else value for name, value in vars(scheduler).items()}


def restore(scheduler: Any, state: dict[str, Any]) -> None:
    """Put such attributes back; the lists are copied again, so that the same state can be put back twice."""
    vars(scheduler).clear()
    vars(scheduler).update({name: list(value) if isinstance(value, list) else value for name, value in state.items()})


def storage(call: StepCall, answer: Any) -> torch.dtype:
    """The type latents are kept in: the scheduler's, or under autocast, which would round them, the state's."""
    under_autocast = torch.is_autocast_enabled(call.sample.device.type)
    return call.sample.dtype if under_autocast else first(answer).dtype
