"""The trial: several rewards beside each other on pictures of the model as it is, before the first update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tiller.algorithms.base import Algorithm
from tiller.distributed import World
from tiller.policy import Policy
from tiller.preflight import ROUNDS, SAMPLES, drawn_for_trial
from tiller.rewards import Reward, score
from tiller.rewards.mix import Mix
from tiller.rewards.scale import Beside, beside, scaled
from tiller.types import Prompt, Scores, join_scores


def calibrated(
    policy: Policy,
    prompts: Sequence[Prompt],
    reward: Reward,
    algorithm: Algorithm,
    sampling: Mapping[str, Any],
    seed: int,
    world: World,
    seen: Scores | None = None,
) -> tuple[Reward, Beside | None]:
    """The reward with every scale measured that it is to be normalised by, and how its parts look beside each other.

    One reward alone is described by what preflight has `seen` of it, and nothing is drawn.

    Raises:
        RewardError: the reward failed; or one that is to be normalised gave one and the same score, or none.
    """
    if not isinstance(reward, Mix):
        return reward, None if seen is None else beside(reward, seen)
    scores = trial(policy, prompts, reward, algorithm, sampling, seed, world)
    measured = scaled(reward, scores)
    return measured, beside(measured, scores)


def trial(
    policy: Policy,
    prompts: Sequence[Prompt],
    reward: Reward,
    algorithm: Algorithm,
    sampling: Mapping[str, Any],
    seed: int,
    world: World,
) -> Scores:
    """Scores of 32 pictures: four each of eight prompts spread over the list, with all denoising steps.

    The processes share the work, and all get the same scores.
    """
    mine = []
    for turn in world.share(range(ROUNDS)):
        prompt, images = drawn_for_trial(policy, prompts, algorithm, sampling, seed, turn)
        mine.append(score(reward, images, [prompt.text] * SAMPLES, [prompt.metadata] * SAMPLES))
    return join_scores(world.gather(mine))
