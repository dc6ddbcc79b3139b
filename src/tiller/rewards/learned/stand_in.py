"""A reward that answers in the place of people: which of two pictures is better, or how well one fits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tiller.rewards.learned.calibration import logistic
from tiller.types import ConfigError


def preferences(
    first: Sequence[float], second: Sequence[float], margin: float, temperature: float, random: np.random.Generator
) -> np.ndarray:
    """(N,) 1 where the first of two pictures is chosen, 0 where the second is, a half for a tie, NaN without a score.

    A tie is a difference of at most `margin`. At temperature 0 the higher score is chosen; above, the first is chosen
    with probability σ((s_1 - s_2)/temperature), as people do whom Bradley and Terry (1952) describe.
    """
    gaps = np.asarray(first, float) - np.asarray(second, float)
    drawn = random.random(len(gaps))  # as many as there are pairs, whatever the scores are
    sure = (gaps > 0).astype(float)
    chosen = sure if temperature == 0 else (drawn < logistic(gaps / temperature)).astype(float)
    return np.where(np.isnan(gaps), np.nan, np.where(np.abs(gaps) <= margin, 0.5, chosen))


def labels(
    scores: Sequence[float], threshold: float | None, temperature: float, random: np.random.Generator
) -> np.ndarray:
    """(N,) labels in [0, 1], NaN without a score: whether a score reaches `threshold`, or the score itself.

    Above temperature 0 a label is 1 with probability σ((score - threshold)/temperature).

    Raises:
        ConfigError: there is no threshold, and a score lies outside of [0, 1] or is to be drawn.
    """
    found = np.asarray(scores, float)
    drawn = random.random(len(found))
    if threshold is None:
        known = found[~np.isnan(found)]
        if temperature or (len(known) and (known.min() < 0 or known.max() > 1)):
            raise ConfigError(
                "labels are from 0 to 1, and these scores are not; give a threshold, such as threshold=0.5."
            )
        return found
    reached = found >= threshold if temperature == 0 else drawn < logistic((found - threshold) / temperature)
    return np.where(np.isnan(found), np.nan, reached.astype(float))
