"""Preflight of a live walk: the reward's gradient must come back through the last steps that a rollout took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from tiller.algorithms.base import Pass, RewardGradient
from tiller.policy import Policy, Rollout
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

    One picture is tried for each (prompt, call) of `attempts`, until a reward is not flat: it may well be for a blur.

    Raises:
        PipelineError: the live picture is another, or has no graph.
        RewardError: the reward fails, or its gradient is not finite, or 0 in all pictures tried.
    """
    tried = 0
    for prompt, call in attempts:
        tried += 1
        rollout = policy.sample([prompt.text], seed=seed, kernel=algorithm.kernel, **call)
        score(reward, rollout.images, [prompt.text], [prompt.metadata])
        passes = algorithm.passes(len(rollout.records), np.random.default_rng(seed))
        check_same(policy, rollout, min(one.start for one in passes))
        slope = steepest(policy, reward, rollout, passes, prompt)
        if not np.isfinite(slope):
            raise RewardError(f"the gradient of reward {reward_name(reward)} is not finite; mend it.")
        if slope > 0:
            return
    raise RewardError(
        f"the gradient of reward {reward_name(reward)} is 0 in every pixel of {tried} picture(s); it must rise and "
        "fall with the pixels, so round, clip and compare nothing in it."
    )


def check_same(policy: Policy, rollout: Rollout, start: int) -> None:
    """The steps from `start` on, taken again without training in between, lead to the recorded picture."""
    with torch.no_grad():
        again = policy.unroll(rollout, start).cpu()
    error = float((again - as_tensor(rollout.images)).abs().max())
    if not error <= TOLERANCE:
        raise PipelineError(
            f"taking the last steps of {type(policy.pipe).__name__} again gives another picture (by {error:.2g} of 1); "
            "turn off what is random in it, such as dropout."
        )


def steepest(policy: Policy, reward: Reward, rollout: Rollout, passes: list[Pass], prompt: Prompt) -> float:
    """The largest slope of the reward in any pixel of any pass; 0 where it gives no score. Weights get gradients."""
    slopes = [0.0]
    for step in live(policy, reward, rollout, passes, [prompt.text], [prompt.metadata]):
        if bool(step.rewards.isfinite().all()):
            step.pictures.register_hook(lambda gradient: slopes.append(float(gradient.abs().max())))
            step.backward(step.rewards.sum())
    return float(np.max(slopes))
