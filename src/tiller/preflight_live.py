"""Preflight where the reward is differentiated: its gradient must come back through what made the picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tiller.adjoint import LeanAdjoint
from tiller.algorithms.base import Algorithm, Pass, RewardGradient
from tiller.policy import Policy, Rollout, Step
from tiller.rewards import Reward, score
from tiller.rewards.contract import reward_name
from tiller.rewards.gradient import as_tensor
from tiller.types import PipelineError, Prompt, RewardError
from tiller.walks import live

TOLERANCE = 2 / 255  # of a live picture against the recorded one, which is rounded to 8 bits


def check_live(
    policy: Policy,
    reward: Reward,
    algorithm: RewardGradient,
    attempts: Iterable[tuple[Prompt, Mapping[str, Any]]],
    seed: int = 0,
) -> None:
    """A live picture is the recorded one, and the reward has a gradient in it, which is left in the trained weights.

    Raises:
        PipelineError: the live picture is another, or has no graph.
        RewardError: the reward fails, or its gradient is not finite, or 0 in all pictures tried.
    """

    def slope(rollout: Rollout, prompt: Prompt) -> float:
        passes = algorithm.passes(len(rollout.records), np.random.default_rng(seed))
        check_same(policy, rollout, min(one.start for one in passes))
        return steepest(policy, reward, rollout, passes, prompt)

    _check_slopes(policy, reward, algorithm, attempts, seed, slope)


def check_adjoint(
    policy: Policy,
    reward: Reward,
    algorithm: Algorithm,
    attempts: Iterable[tuple[Prompt, Mapping[str, Any]]],
    seed: int = 0,
) -> None:
    """The clean latents decode to the recorded picture, the reward has a gradient in them, and it can be carried back.

    Raises:
        PipelineError: the decoded picture is another, or has no graph; or the model's has none back to its input.
        RewardError: the reward fails, or its gradient is not finite, or 0 in all pictures tried.
    """

    def slope(rollout: Rollout, prompt: Prompt) -> float:
        total = len(rollout.records)
        check_same(policy, rollout, total, rollout.latents[-1])
        check_input(policy, rollout, total - 1)
        adjoint = LeanAdjoint(policy, reward, rollout, [prompt.text], [prompt.metadata])
        adjoint.back_to(max(1, total - 1))
        return float(adjoint.states[max(1, total - 1)].abs().max())

    _check_slopes(policy, reward, algorithm, attempts, seed, slope)


def _check_slopes(
    policy: Policy,
    reward: Reward,
    algorithm: Algorithm,
    attempts: Iterable[tuple[Prompt, Mapping[str, Any]]],
    seed: int,
    slope_of: Callable[[Rollout, Prompt], float],
) -> None:
    """One picture is tried for each (prompt, call), until a reward is not flat: it may well be for a blur."""
    tried = 0
    for prompt, call in attempts:
        tried += 1
        rollout = policy.sample([prompt.text], seed=seed, kernel=algorithm.kernel, **call)
        score(reward, rollout.images, [prompt.text], [prompt.metadata])
        slope = slope_of(rollout, prompt)
        if not np.isfinite(slope):
            raise RewardError(f"the gradient of reward {reward_name(reward)} is not finite; mend it.")
        if slope > 0:
            return
    raise RewardError(
        f"the gradient of reward {reward_name(reward)} is 0 in every pixel of {tried} picture(s); it must rise and "
        "fall with the pixels, so round, clip and compare nothing in it."
    )


def check_same(policy: Policy, rollout: Rollout, start: int, state: Tensor | None = None) -> None:
    """The steps from `start` on, taken again without training in between, lead to the recorded picture."""
    with torch.no_grad():
        again = policy.unroll(rollout, start, state=state).cpu()
    error = float((again - as_tensor(rollout.images)).abs().max())
    if not error <= TOLERANCE:
        raise PipelineError(
            f"taking the last steps of {type(policy.pipe).__name__} again gives another picture (by {error:.2g} of 1); "
            "turn off what is random in it, such as dropout."
        )


def check_input(policy: Policy, rollout: Rollout, index: int) -> None:
    """The model's output at a step has a graph that leads back to its latents."""
    if not index:
        return  # one step only: nothing is carried back
    state = rollout.latents[index].float().clone().requires_grad_()
    found: list[Any] = []

    def on_step(step: Step) -> None:
        found.extend(torch.autograd.grad(step.prediction.sum(), state, allow_unused=True))

    policy.predict(rollout, on_step, lambda _: state, [index])
    if found[0] is None:
        raise PipelineError(
            f"the gradient of {type(policy.pipe).__name__} does not reach the latents that its denoiser gets; train it "
            "with an algorithm that needs none there, such as draft with last_steps 1, or ddpo."
        )


def steepest(policy: Policy, reward: Reward, rollout: Rollout, passes: list[Pass], prompt: Prompt) -> float:
    """The largest slope of the reward in any pixel of any pass; 0 where it gives no score. Weights get gradients."""
    slopes = [0.0]
    for step in live(policy, reward, rollout, passes, [prompt.text], [prompt.metadata]):
        if bool(step.rewards.isfinite().all()):
            step.pictures.register_hook(lambda gradient: slopes.append(float(gradient.abs().max())))
            step.backward(step.rewards.sum())
    return float(np.max(slopes))
