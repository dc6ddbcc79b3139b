"""Preflight: what would train wrongly is refused before the first update, in a sentence that says what to do."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tiller.algorithms.base import Algorithm, RewardGradient
from tiller.data import data_frame
from tiller.kernels import ODE
from tiller.pairs import Pairs
from tiller.policy import Policy, Rollout, Step
from tiller.policy.forward import ForwardProcess
from tiller.policy.weights import ADAPTER
from tiller.preflight_live import check_adjoint, check_live
from tiller.pretrain.data import Source
from tiller.rewards import Reward, score
from tiller.rewards.check import describe
from tiller.types import PipelineError, Prompt, RewardError, Scores, join_scores
from tiller.vote import asks_people

STEPS = 4  # denoising steps of the trial calls, where the pipeline lets one choose
SAMPLES = 4  # pictures of the trial, all of one prompt, so that a reward can be seen to vary within a group
ROUNDS = 8  # more of these, in full and of other prompts, where the trial's pictures all get the same score
RATIO_TOLERANCE = 1e-4  # |log π_θ - log π_old| before any update, averaged over elements


def preflight(
    policy: Policy,
    prompts: Sequence[Prompt],
    reward: Reward | None,
    algorithm: Algorithm,
    sampling: Mapping[str, Any],
    seed: int = 0,
    data: Source | Pairs | None = None,
) -> Scores | None:
    """Refuse a pipeline, reward or setting with which training could not work; what it saw of the reward.

    What is checked of the pipeline depends on the walk that the algorithm learns from, and on whether it gets data.
    Without a reward, as preference pairs need none, that is not asked; nor are people, before there is need to.

    Raises:
        PipelineError: replay differs from the recording, gradients do not reach the trained weights (or reach others),
            fresh adapters change the pictures, or the policy without noise differs from the stock pipeline.
        RewardError: the reward fails, or cannot tell pictures of one prompt apart; or has no gradient, where the
            algorithm asks for one.
    """
    call = _short(policy, sampling)
    texts = [prompts[0].text] * SAMPLES
    attempts = [(prompts[0], call), *((prompt, dict(sampling)) for prompt in prompts[:ROUNDS])]
    if isinstance(algorithm, RewardGradient) and reward is not None:
        check_live(policy, reward, algorithm, attempts, seed)
        _check_gradients(policy)
        check_stock(policy, texts[0], seed, call)
        return None
    rollout = policy.sample(texts, seed=seed, kernel=algorithm.kernel, **call)
    seen = None if reward is None or asks_people(reward) else _judged(reward, rollout.images, prompts[0])
    varies = seen is None or algorithm.differentiates or not describe(seen, texts)
    if algorithm.walk == "noised":
        check_noised(policy, rollout)
    else:
        check_replay(policy, rollout)
    if algorithm.differentiates and reward is not None:
        check_adjoint(policy, reward, algorithm, attempts, seed)
    if data is not None:
        check_noised(policy, *data_frame(policy, data, rollout, seed))
    check_stock(policy, texts[0], seed, call)
    if reward is not None and not varies:
        return check_reward(policy, prompts, reward, algorithm, sampling, seed)
    return seen


def check_reward(
    policy: Policy,
    prompts: Sequence[Prompt],
    reward: Reward,
    algorithm: Algorithm,
    sampling: Mapping[str, Any],
    seed: int = 0,
) -> Scores:
    """The reward tells two pictures of a prompt apart, within some rounds over prompts from all of the list.

    These pictures get all of their denoising steps: a judge of success may find none in a blur. It stops at the first
    difference.

    Raises:
        RewardError: all pictures of each prompt got the same score, or none.
    """
    texts: list[str] = []
    parts: list[Scores] = []
    for turn in range(ROUNDS):
        prompt, images = drawn_for_trial(policy, prompts, algorithm, sampling, seed, turn)
        texts += [prompt.text] * SAMPLES
        parts.append(_judged(reward, images, prompt))
        complaint = describe(join_scores(parts), texts)
        if not complaint:
            return join_scores(parts)
    raise RewardError(complaint)


def drawn_for_trial(
    policy: Policy, prompts: Sequence[Prompt], algorithm: Algorithm, sampling: Mapping[str, Any], seed: int, turn: int
) -> tuple[Prompt, Sequence[Any]]:
    """One of ROUNDS prompts spread over the list, and SAMPLES pictures of it with all steps; others where it recurs."""
    lap, place = divmod(turn, min(ROUNDS, len(prompts)))
    prompt = prompts[place * len(prompts) // min(ROUNDS, len(prompts))]
    samples = range(lap * SAMPLES, (lap + 1) * SAMPLES)
    asked = [prompt.text] * SAMPLES
    return prompt, policy.sample(asked, seed=seed, samples=samples, kernel=algorithm.kernel, **sampling).images


def _judged(reward: Reward, images: Sequence[Any], prompt: Prompt) -> Scores:
    return score(reward, images, [prompt.text] * len(images), [prompt.metadata] * len(images))


def check_replay(policy: Policy, rollout: Rollout) -> None:
    """At every trainable step: ratio 1, and a gradient for the trained weights and for no others."""
    if not rollout.steps:
        raise PipelineError(
            f"no step of {type(policy.pipe).__name__} has a density under {rollout.kernel}; choose a kernel with "
            "noise, or more inference steps."
        )
    errors: dict[int, float] = {}

    def on_step(step: Step) -> None:
        assert step.old_log_prob is not None
        error = float((step.log_prob.detach() - step.old_log_prob).abs().max())
        errors[step.index] = max(error if error == error else np.inf, errors.get(step.index, 0.0))
        _backward(policy, step, step.log_prob)

    policy.replay(rollout, on_step)
    policy.replay(rollout, on_step, rollout.steps[-1:])  # by itself: what is random shows where steps are left out
    worst = max(errors, key=lambda index: errors[index])
    if errors[worst] > RATIO_TOLERANCE:
        raise PipelineError(
            f"replaying {type(policy.pipe).__name__} gives other log-probabilities than recording it (by "
            f"{errors[worst]:.2g} at step {worst}); turn off what is random in it, such as dropout, "
            "and model.compile in bfloat16."
        )
    _check_gradients(policy)


def check_noised(policy: Policy, rollout: Rollout, path: ForwardProcess | None = None) -> None:
    """At every forward-noised state: a gradient of the model's error for the trained weights."""
    path = path or ForwardProcess(rollout, fresh=0)
    policy.predict(rollout, lambda step: _backward(policy, step, step.distance()), path, range(len(rollout.records)))
    _check_gradients(policy)


def _backward(policy: Policy, step: Step, values: Tensor) -> None:
    if not values.requires_grad:
        raise PipelineError(
            f"no gradient reaches the denoiser of {type(policy.pipe).__name__} at step {step.index}; "
            "it cannot be trained through its own loop."
        )
    step.backward(values.sum())


def _check_gradients(policy: Policy) -> None:
    trained = policy.parameters
    reached = [name for name, p in trained.items() if p.grad is not None and bool((p.grad != 0).any())]
    broken = [name for name, p in trained.items() if p.grad is not None and not bool(p.grad.isfinite().all())]
    for parameter in trained.values():
        parameter.grad = None
    if broken:
        raise PipelineError(f"the gradient of {broken[0]} is not finite; load the model in float32 or bfloat16.")
    if not reached:
        raise PipelineError(
            f"no gradient reaches any of the {len(trained)} trained weights of {type(policy.pipe).__name__}; "
            "name layers of its denoiser in model.target_modules."
        )


def check_stock(policy: Policy, prompt: str, seed: int, call: Mapping[str, Any]) -> None:
    """Without noise the policy's picture is the stock pipeline's own; fresh adapters change nothing."""
    arguments = {**call, "output_type": "np"} if _takes(policy, "output_type") else dict(call)
    ours = policy.sample(prompt, seed=seed, kernel=ODE(), **arguments)
    stock = policy.stock(prompt, seed=seed, **arguments)
    if not _finite(stock):
        raise PipelineError(
            f"the picture of {type(policy.pipe).__name__} is not finite; load the model in float32 or bfloat16."
        )
    error = _distance(ours.images, stock)
    if not error <= 1e-3:
        raise PipelineError(
            f"sampling {type(policy.pipe).__name__} without noise differs from the pipeline's own picture (by "
            f"{error:.2g} of 1); this is a fault of tiller, please report it with the pipeline's name."
        )
    if policy.lora_rank is None or not _fresh(policy):
        return
    with policy.base():
        base = policy.stock(prompt, seed=seed, **arguments)
    error = _distance(stock, base)
    if not error <= 1e-3:
        raise PipelineError(
            f"fresh adapters change the picture (by {error:.2g} of 1); load the model without adapters."
        )


def _short(policy: Policy, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The call with a few denoising steps only, where the pipeline lets one choose."""
    steps = {name: STEPS for name in ("num_inference_steps",) if _takes(policy, name)}
    if "num_inference_steps" in sampling:
        steps = {"num_inference_steps": min(STEPS, sampling["num_inference_steps"])}
    if "timesteps" in sampling or "sigmas" in sampling:
        steps = {}
    return {**sampling, **steps}


def _fresh(policy: Policy) -> bool:
    """Whether the adapters still are the identity."""
    return all(not bool(p.any()) for name, p in policy.parameters.items() if f"lora_B.{ADAPTER}." in name)


def _takes(policy: Policy, name: str) -> bool:
    return name in inspect.signature(type(policy.pipe).__call__).parameters


def _array(output: Any) -> np.ndarray:
    return np.asarray(output.cpu() if isinstance(output, torch.Tensor) else output, dtype=np.float64)


def _finite(output: Any) -> bool:
    return bool(np.isfinite(_array(output)).all())


def _distance(one: Any, other: Any) -> float:
    """The largest difference of two outputs with values in [0, 1]."""
    arrays = _array(one), _array(other)
    scale = 255.0 if arrays[0].max() > 2 else 1.0
    return float(np.abs(arrays[0] - arrays[1]).max()) / scale
