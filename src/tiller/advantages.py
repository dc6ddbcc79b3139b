"""Advantages: how much better a picture scored than was to be expected.

A score that is not finite is missing: its advantage is NaN, and it takes part in nobody else's. Everything here takes
and returns float64 numpy arrays of shape (N,): an epoch's samples, over all processes.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, MutableMapping, Sequence

import numpy as np

from tiller.types import Scores

History = MutableMapping[str, list[float]]
"""Per prompt, its latest rewards, oldest first: the state of the running statistics."""


def global_(values: np.ndarray) -> np.ndarray:
    """(r - mean) / std over all samples (Black et al. 2023, section 4.3, without per-prompt statistics)."""
    values = _finite(values)
    return (values - _mean(values)) / (_std(values) + 1e-8)


def group(values: np.ndarray, groups: Sequence[Hashable], scale: str = "group", unbiased: bool = True) -> np.ndarray:
    """(r - mean of its group) / std: GRPO's advantage (Shao et al. 2024, DeepSeekMath, section 4.1.2).

    `scale` is "group" (the group's own std, as DanceGRPO), "batch" (the std of all samples + 1e-4, as Flow-GRPO) or
    "none". A group without spread, or with fewer than two scores, teaches nothing: its advantages are 0.
    """
    values = _finite(values)
    advantages = np.full(len(values), np.nan)
    for members in _members(groups):
        rewards = values[members]
        known = rewards[np.isfinite(rewards)]
        if len(known) < 2 or np.ptp(known) == 0:
            advantages[members] = np.where(np.isfinite(rewards), 0.0, np.nan)
            continue
        spread = {
            "group": known.std(ddof=int(unbiased)) + 1e-8,
            "batch": _std(values) + 1e-4,
            "none": 1.0,
        }[scale]
        advantages[members] = (rewards - known.mean()) / spread
    return advantages


def per_prompt(
    values: np.ndarray, prompts: Sequence[str], history: History, buffer_size: int = 32, min_count: int = 16
) -> np.ndarray:
    """(r - mean) / std of the prompt's latest `buffer_size` rewards, these included (Black et al. 2023, section 4.3).

    Until a prompt has `min_count` rewards, the statistics of all samples stand in. `history` is brought up to date.
    """
    values = _finite(values)
    _remember(values, prompts, history, buffer_size)
    mean, std = _mean(values), _std(values)
    advantages = np.full(len(values), np.nan)
    for index, (prompt, value) in enumerate(zip(prompts, values, strict=True)):
        latest = np.asarray(history.get(prompt, []))
        enough = len(latest) >= min_count
        centre, spread = (latest.mean(), latest.std()) if enough else (mean, std)
        advantages[index] = (value - centre) / (spread + 1e-6)
    return advantages


def gdpo(
    components: Mapping[str, np.ndarray], groups: Sequence[Hashable], weights: Mapping[str, float] | None = None
) -> np.ndarray:
    """Each reward standardised within its group, their weighted sum over the batch (Liu et al. 2026, GDPO).

    Standard deviations are the population's, and never less than 1e-6. No reward drowns another by its scale.
    """
    total = np.zeros(len(groups))
    for name, column in components.items():
        values = _finite(column)
        standardised = np.full(len(values), np.nan)
        for members in _members(groups):
            rewards = values[members]
            standardised[members] = (rewards - _mean(rewards)) / max(_std(rewards), 1e-6)
        total = total + (1.0 if weights is None else weights[name]) * standardised
    return (total - _mean(total)) / max(_std(total), 1e-6)


def group_relative(scores: Scores, groups: Sequence[Hashable], scale: str, clip: float) -> np.ndarray:
    """The group-relative methods' advantage, clipped: `group` with this scale, or `gdpo` of the rewards' parts."""
    if scale == "gdpo":
        found = gdpo(scores.components or {"reward": scores.values}, groups)
        found = np.where(scores.valid, found, np.nan)
    else:
        found = group(scores.values, groups, scale)
    return found.clip(-clip, clip)


def softmax_weights(
    values: np.ndarray, prompts: Sequence[str], beta: float, standardise: bool = False, per_prompt: bool = False
) -> np.ndarray:
    """n·softmax(β·r) over all samples, or over each prompt's: weights of mean 1 (Black et al. 2023, section 4.2)."""
    values = _finite(values)
    if standardise:
        values = (values - _mean(values)) / (_std(values) + 1e-8)
    weights = np.full(len(values), np.nan)
    for members in _members(prompts) if per_prompt else [np.arange(len(values))]:
        known = members[np.isfinite(values[members])]
        if len(known):
            powers = np.exp(beta * (values[known] - values[known].max()))
            weights[known] = len(known) * powers / powers.sum()
    return weights


def top_share(
    values: np.ndarray, prompts: Sequence[str], history: History, share: float, buffer_size: int
) -> np.ndarray:
    """1 for rewards at or above the (1 - share) quantile of the prompt's latest ones, NaN (left out) for the rest.

    `history` is brought up to date. A prompt whose latest rewards are all equal is left out.
    """
    values = _finite(values)
    _remember(values, prompts, history, buffer_size)
    kept = np.full(len(values), np.nan)
    for index, (prompt, value) in enumerate(zip(prompts, values, strict=True)):
        latest = np.asarray(history.get(prompt, []))
        if np.isfinite(value) and np.ptp(latest) > 0 and value >= np.quantile(latest, 1 - share):
            kept[index] = 1.0
    return kept


def best_of_group(values: np.ndarray, groups: Sequence[Hashable]) -> np.ndarray:
    """1 for the best of each group (all of them where several tie), NaN (left out) for the rest.

    A group without spread is left out: there is no best in it.
    """
    values = _finite(values)
    kept = np.full(len(values), np.nan)
    for members in _members(groups):
        known = members[np.isfinite(values[members])]
        if len(known) and np.ptp(values[known]) > 0:
            kept[known[values[known] == values[known].max()]] = 1.0
    return kept


def zero_spread_groups(values: np.ndarray, groups: Sequence[Hashable]) -> int:
    """How many groups have no two different scores, so that a group-relative method learns nothing from them."""
    return sum(len(np.unique(values[m][np.isfinite(values[m])])) < 2 for m in _members(groups))


def _remember(values: np.ndarray, prompts: Sequence[str], history: History, buffer_size: int) -> None:
    for prompt, value in zip(prompts, values, strict=True):
        if np.isfinite(value):
            history[prompt] = [*history.get(prompt, []), float(value)][-buffer_size:]


def _members(groups: Sequence[Hashable]) -> list[np.ndarray]:
    labels = np.asarray(groups)
    return [np.flatnonzero(labels == label) for label in dict.fromkeys(labels.tolist())]


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def _std(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.std()) if len(known) else float("nan")
