"""Can a reward be trained on: do its scores differ, does it fit the batches, has it a gradient, are there enough?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from tiller.rewards.call import Reward, relative, reward_name
from tiller.rewards.gradient import differentiable
from tiller.rewards.mix import parts_of
from tiller.types import ConfigError, Scores

CURE = "check it on pictures that it should tell apart, or choose prompts where it sometimes gives another score"


def describe(scores: Scores, prompts: Sequence[str] | None = None) -> str:
    """One sentence on what makes N scores useless for training; empty if nothing does.

    With the N pictures' `prompts`, at least two pictures of one prompt must have different scores: an advantage is
    a difference within a group.
    """
    values = scores.values[scores.valid]
    pictures = f"{len(scores.values)} pictures" + _of(prompts)
    if not len(scores.values):
        return "there are no pictures to score."
    if not len(values):
        why = ", ".join(sorted(set(scores.reasons.values()))) or "NaN"
        return f"the reward gave no score to any of {pictures} (all {why}); {CURE}."
    if len(values) == 1 and len(scores.values) > 1:
        return f"the reward gave a score to only one of {pictures}, so there is nothing to compare; {CURE}."
    if len(values) > 1 and np.ptp(values) == 0:
        missing = "" if len(values) == len(scores.values) else ", where it gave one at all"
        return (
            f"the reward gave {values[0]:g} to every one of {pictures}{missing}, so there is nothing to prefer; {CURE}."
        )
    if prompts is not None and not _varies_within_a_group(scores, prompts):
        return (
            f"the reward gave the same score to all pictures of a prompt, for {pictures}; it must depend on the "
            "picture, not on the prompt alone."
        )
    return ""


def _of(prompts: Sequence[str] | None) -> str:
    """ " of 8 prompts", where the prompts are known."""
    count = len(set(prompts or ()))
    return "" if not prompts else " of one prompt" if count == 1 else f" of {count} prompts"


def _varies_within_a_group(scores: Scores, prompts: Sequence[str]) -> bool:
    groups: dict[str, list[float]] = {}
    for prompt, value in zip(prompts, scores.values, strict=True):
        if np.isfinite(value):
            groups.setdefault(prompt, []).append(value)
    return any(min(group) < max(group) for group in groups.values())


def check_groups(reward: Reward, batch_size: int, group_size: int) -> None:
    """A reward that compares pictures gets whole groups, of two at least.

    Raises:
        ConfigError: a batch would split them, or there is nothing to compare.
    """
    if not relative(reward):
        return
    name = reward_name(reward)
    if group_size < 2:
        raise ConfigError(
            f"reward {name} compares the pictures of a prompt, and train.group_size is {group_size}; make it at least "
            "2."
        )
    if batch_size % group_size:
        raise ConfigError(
            f"reward {name} compares all pictures of a prompt, and a batch of {batch_size} splits groups of "
            f"{group_size}; make train.batch_size a multiple of train.group_size, such as "
            f"{max(1, batch_size // group_size) * group_size}."
        )


def check_gradient(reward: Reward, algorithm: str) -> None:
    """A reward whose gradient is asked for has one.

    Raises:
        ConfigError: it, or a part of it that counts, has none, or compares pictures.
    """
    without = [part for part in parts_of(reward) if part.weight and not differentiable(part.reward)]
    if without:
        raise ConfigError(
            f"{algorithm} differentiates the reward, and {without[0].label} is not differentiable; take one that is "
            "(it says `differentiable = True`), or an algorithm that needs values only, such as ddpo."
        )
    if relative(reward):
        raise ConfigError(
            f"{algorithm} differentiates the reward picture by picture, and {reward_name(reward)} compares the "
            "pictures of a prompt; take a reward that scores each by itself, or an algorithm such as flow_grpo."
        )


def too_many_missing(scores: Scores, reward: Reward, share: float) -> str:
    """Which reward left out more of an epoch's scores than it may, and why, in one sentence; empty if none did.

    `share` holds for every reward that counts and states none of its own, and for the sum; 1 allows everything.
    """
    parts = parts_of(reward)
    wanted = [
        (part.label, scores.components.get(part.label, scores.values), part.max_missing, share if part.weight else 1.0)
        for part in parts
    ]
    for label, column, own, others in [*wanted, (reward_name(reward), scores.values, None, share)]:
        allowed = others if own is None else own
        missing = ~np.isfinite(column)
        if len(column) and missing.mean() > allowed:
            return (
                f"reward {label} gave no score to {missing.sum()} of {len(column)} pictures ({missing.mean():.0%}, "
                f"more than the {allowed:.0%} that max_missing allows): {_commonest(scores, label)}; mend it and give "
                "the same command again, or raise run.max_missing."
            )
    return ""


def _commonest(scores: Scores, label: str) -> str:
    """The three commonest reasons of one part of a sum, or of all where it has none of its own."""
    prefix, said = f"{label}: ", list(scores.reasons.values())
    own = [piece.removeprefix(prefix) for all_ in said for piece in all_.split("; ") if piece.startswith(prefix)]
    common = Counter(own or said).most_common(3)
    return "; ".join(f"{reason} ({count} times)" for reason, count in common) or "no reason was given"
