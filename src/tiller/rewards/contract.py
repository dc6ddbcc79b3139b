"""The contract of a reward: `(images, prompts, metadata) -> one score per image`, checked at the door.

A score that is None, NaN or infinite is missing: it becomes NaN with a reason, and is left out of every
statistic and update. It never becomes 0: in a group of .80 .82 .84 .86, a 0 in place of the last one turns
the best picture into the one that is pushed away from.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL.Image import Image

from tiller.rewards.call import FLAGS, Reward, call, flag, reward_name
from tiller.rewards.rows import column
from tiller.types import RewardError, Scores

__all__ = ["FLAGS", "Reward", "pointwise", "reward_name", "score"]


def score(
    reward: Reward,
    images: Sequence[Image],
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    weights: Mapping[str, float] | None = None,
    groups: Sequence[Hashable] | None = None,
) -> Scores:
    """Call `reward` on N pictures and return N checked scores.

    Where it returns named lists, the total is their sum, or their sum weighted by `weights`, which must
    name each of them; a weight of 0 keeps a list for the log alone. The total is missing where any list
    that counts is.

    `groups` says for each picture which group it is of, for a reward that compares the pictures of a group; without
    it, pictures of equal prompts are one group.

    Raises `RewardError` if the function raises, or returns anything but one entry per picture.
    """
    if not len(images) == len(prompts) == len(metadata):
        raise RewardError(
            f"{len(images)} images, {len(prompts)} prompts and {len(metadata)} metadata entries do not "
            "belong together; give one of each per picture."
        )
    if not images:
        return Scores(np.empty(0))
    if hasattr(reward, "scores"):  # of several rewards, or out of a cache
        found: Scores = reward.scores(images, prompts, metadata, groups)
        return found
    if flag(reward, "groupwise") or flag(reward, "pairwise"):
        from tiller.rewards.groups import score_groups

        return score_groups(reward, images, prompts, metadata, weights, prompts if groups is None else groups)
    return pointwise(reward, images, prompts, metadata, weights)


def pointwise(
    reward: Reward,
    images: Sequence[Image],
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    weights: Mapping[str, float] | None = None,
) -> Scores:
    """One call with all the pictures, checked: what `score` does for a reward that compares nothing."""
    result = call(reward, [list(images)], list(prompts), list(metadata))
    name = reward_name(reward)
    if isinstance(result, Mapping):
        return _total(name, result, weights, prompts)
    if weights:
        raise RewardError(f"reward {name} returned one list of scores, so there is nothing to weigh; drop the weights.")
    found = column(name, result, prompts)
    return Scores(found.values, {}, found.reasons, found.notes)


def _total(name: str, parts: Mapping[Any, Any], weights: Mapping[str, float] | None, prompts: Sequence[str]) -> Scores:
    """The weighted sum of named scores, and each of them for the log."""
    if not parts or not all(isinstance(part, str) for part in parts):
        raise RewardError(f"reward {name} returned a mapping without names; return {{'name': [one score per image]}}.")
    if weights is not None and set(weights) != set(parts):
        raise RewardError(
            f"reward {name} returned the scores {_names(parts)} but the weights name {_names(weights)}; "
            "give each score a weight (0 only logs it)."
        )
    known = {part: column(f"{name}[{part}]", result, prompts) for part, result in parts.items()}
    return weighted_sum(
        {part: Scores(found.values, {}, found.reasons, found.notes) for part, found in known.items()}, weights or {}
    )


def weighted_sum(parts: Mapping[str, Scores], weights: Mapping[str, float]) -> Scores:
    """The sum of named scores, each with its weight (1, where none is given): missing where any that counts is.

    Each part is kept as a component, as it was returned; a reason or note is told with the name of its part.
    """
    total: np.ndarray = np.zeros(len(next(iter(parts.values())).values))
    reasons: dict[int, list[str]] = {}
    notes: dict[int, list[str]] = {}
    for name, part in parts.items():
        for index, note in part.notes.items():
            notes.setdefault(index, []).append(f"{name}: {note}")
        if weights.get(name, 1.0) == 0:
            continue
        total = total + weights.get(name, 1.0) * part.values
        for index, reason in part.reasons.items():
            reasons.setdefault(index, []).append(f"{name}: {reason}")
    return Scores(
        total,
        {name: part.values for name, part in parts.items()},
        {index: "; ".join(said) for index, said in reasons.items()},
        {index: "\n".join(said) for index, said in notes.items()},
    )


def _names(mapping: Mapping[Any, Any]) -> str:
    return ", ".join(sorted(map(str, mapping))) or "nothing"
