"""Advantages: how much better a picture scored than was to be expected.

A score that is not finite is missing: its advantage is NaN, and it takes part in nobody else's. Everything here takes
and returns float64 numpy arrays of shape (N,): an epoch's samples, over all processes.
"""

from __future__ import annotations

from collections.abc import Hashable, MutableMapping, Sequence

import numpy as np

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
    for prompt, value in zip(prompts, values, strict=True):
        if np.isfinite(value):
            history[prompt] = [*history.get(prompt, []), float(value)][-buffer_size:]
    mean, std = _mean(values), _std(values)
    advantages = np.full(len(values), np.nan)
    for index, (prompt, value) in enumerate(zip(prompts, values, strict=True)):
        latest = np.asarray(history.get(prompt, []))
        enough = len(latest) >= min_count
        centre, spread = (latest.mean(), latest.std()) if enough else (mean, std)
        advantages[index] = (value - centre) / (spread + 1e-6)
    return advantages


def zero_spread_groups(values: np.ndarray, groups: Sequence[Hashable]) -> int:
    """How many groups have no two different scores, so that a group-relative method learns nothing from them."""
    return sum(len(np.unique(values[m][np.isfinite(values[m])])) < 2 for m in _members(groups))


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
