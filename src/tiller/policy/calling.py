"""One call of a pipeline: who is in the batch, where its random numbers come from, and quietly."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from tiller.policy import noise, seam

# Solvers that ask the model more than once per step have no single transition; their first-order kin takes their place.
ONE_CALL_PER_STEP: Mapping[str, Any] = {
    "PNDMScheduler": DDIMScheduler,
    "HeunDiscreteScheduler": EulerDiscreteScheduler,
    "KDPM2DiscreteScheduler": EulerDiscreteScheduler,
    "KDPM2AncestralDiscreteScheduler": EulerDiscreteScheduler,
    "DPMSolverSDEScheduler": EulerDiscreteScheduler,
    "FlowMatchHeunDiscreteScheduler": FlowMatchEulerDiscreteScheduler,
}

AUTOCAST = {"no": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class RandomState:
    """Where a call's random numbers start when the caller brought generators: theirs, and the global one."""

    generators: Any  # (device, state), or a list of them
    everywhere: Tensor  # state of torch's global CPU generator


def batch(
    prompts: str | Sequence[str] | None, call: Mapping[str, Any]
) -> tuple[tuple[str | None, ...], dict[str, Any]]:
    """One prompt (or None) per picture, and the pipeline's call with the prompts in it."""
    call = dict(call)
    copies = call.get("num_images_per_prompt") or 1
    if prompts is None:
        if call.get("prompt") is not None:
            return tuple(str(text) for text in _listed(call["prompt"]) for _ in range(copies)), call
        return (None,) * (_batch_size(call) * copies), call
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    call["prompt"] = texts if len(texts) > 1 else texts[0]
    return tuple(text for text in texts for _ in range(copies)), call


def occurrences(prompts: Sequence[str | None]) -> tuple[int, ...]:
    """0, 1, 2 ... among equal prompts."""
    seen: dict[str | None, int] = {}
    indices = []
    for prompt in prompts:
        indices.append(seen.get(prompt, 0))
        seen[prompt] = indices[-1] + 1
    return tuple(indices)


def random_state(call: Mapping[str, Any]) -> RandomState | None:
    """The state of the generators that the caller handed over, as they are before the call; None without any."""
    given = call.get("generator")
    return None if given is None else RandomState(_states(given), torch.get_rng_state())


def run(
    pipe: Any,
    call: Mapping[str, Any],
    seed: int,
    prompts: Sequence[str | None],
    samples: Sequence[int],
    state: RandomState | None,
    mixed_precision: str,
    start: str = "start",
) -> Any:
    """The pipeline's own `__call__`, with its random draws keyed by sample, under the wanted precision.

    `start` says what the initial noise is for: another word keys other noise. The global generator is put back
    afterwards. It starts from a key of its own, or where the caller has brought generators, from where the caller left
    it, so that the pipeline draws what it would have drawn by itself.
    """
    arguments = dict(call)
    parameters = inspect.signature(type(pipe).__call__).parameters
    if state is not None:
        arguments["generator"] = _revive(state.generators)
    elif "generator" in parameters:
        sources = noise.generators(start, seed, prompts, samples)
        several = len(sources) > 1 and _takes_several(parameters["generator"])
        arguments["generator"] = sources if several else sources[0]
    asked = parameters.get("prompt")
    if asked is not None and asked.default is inspect.Parameter.empty:
        arguments.setdefault("prompt", None)  # embeddings may stand in for it
    device = pipe._execution_device if hasattr(pipe, "_execution_device") else pipe.device
    dtype = AUTOCAST[mixed_precision]
    with (
        _quiet(pipe),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.autocast(device.type, dtype=dtype, enabled=dtype is not None),
    ):
        torch.manual_seed(noise.key("global", seed, *prompts, *samples))
        if state is not None:
            torch.set_rng_state(state.everywhere)
        return pipe(**arguments)


@contextmanager
def one_call_per_step(pipe: DiffusionPipeline) -> Iterator[None]:
    """Solvers with several model calls per step replaced by their first-order kin, for the length of the block."""
    with ExitStack() as stack:
        for pipeline in seam.pipelines(pipe):
            for name, scheduler in seam.schedulers(pipeline).items():
                simpler = ONE_CALL_PER_STEP.get(type(scheduler).__name__)
                if simpler is not None and vars(pipeline).get(name) is scheduler:
                    stack.enter_context(seam.attribute(pipeline, name, _kin(simpler, scheduler)))
        yield


def _kin(simpler: Any, scheduler: Any) -> Any:
    """A scheduler of class `simpler` with the noise schedule of `scheduler`, which it may not know by name."""
    betas = {"trained_betas": scheduler.betas.tolist()} if hasattr(scheduler, "betas") else {}
    return simpler.from_config(scheduler.config, **betas)


@contextmanager
def _quiet(pipe: DiffusionPipeline) -> Iterator[None]:
    """No progress bars of the pipelines' own for the length of the block."""
    with ExitStack() as stack:
        for pipeline in seam.pipelines(pipe):
            before = dict(getattr(pipeline, "_progress_bar_config", {}))
            stack.enter_context(seam.attribute(pipeline, "_progress_bar_config", {**before, "disable": True}))
        yield


def _batch_size(call: Mapping[str, Any]) -> int:
    """How many samples a call without prompts asks for."""
    if call.get("batch_size"):
        return int(call["batch_size"])
    for name in ("prompt_embeds", "class_labels", "image_embeds", "image_embeddings", "image"):
        value = call.get(name)
        if isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.ndim > 1):
            return len(value)
    return 1


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _takes_several(parameter: inspect.Parameter) -> bool:
    """Whether a pipeline's `generator` may be a list, by its annotation."""
    kind = str(parameter.annotation)
    return "Generator" not in kind or "list" in kind.lower()


def _states(given: Any) -> Any:
    if isinstance(given, torch.Generator):
        return (given.device, given.get_state())
    return [_states(generator) for generator in given]


def _revive(state: Any) -> Any:
    if isinstance(state, list):
        return [_revive(item) for item in state]
    device, bits = state
    generator = torch.Generator(device)
    generator.set_state(bits)
    return generator
