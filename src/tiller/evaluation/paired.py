"""Paired comparison of two models on the same prompts and the same initial noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Comparison:
    """What changed from base to tuned, over the pictures that both were scored on."""

    base: float  # mean score
    tuned: float  # mean score
    difference: float  # mean of tuned - base, picture by picture
    low: float  # 95 % bootstrap interval of the difference
    high: float
    win_rate: float  # share of pictures that scored higher than before, ties counting half
    count: int  # pictures

    @property
    def certain(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def compare(base: np.ndarray, tuned: np.ndarray, prompts: Sequence[str], seed: int = 0) -> Comparison:
    """Compare scores (N,) of the same N (prompt, noise) pairs; a pair with a missing score is left out.

    Pictures of one prompt are not independent, so the bootstrap (Efron & Tibshirani 1993, chapter 8) draws prompts,
    with all of their pictures, where there are at least ten; with fewer prompts it draws pictures.

    Raises:
        ValueError: the lengths differ, or no pair has both scores.
    """
    if not len(base) == len(tuned) == len(prompts):
        raise ValueError(f"got {len(base)} base scores, {len(tuned)} tuned scores and {len(prompts)} prompts")
    both = np.isfinite(base) & np.isfinite(tuned)
    if not both.any():
        raise ValueError("no picture was scored for both models")
    base, tuned, kept = base[both], tuned[both], np.asarray(prompts)[both]
    gains = tuned - base
    low, high = _interval(gains, kept, seed)
    wins = float(((gains > 0) + 0.5 * (gains == 0)).mean())
    return Comparison(float(base.mean()), float(tuned.mean()), float(gains.mean()), low, high, wins, len(gains))


def _interval(gains: np.ndarray, prompts: np.ndarray, seed: int) -> tuple[float, float]:
    names, labels = np.unique(prompts, return_inverse=True)
    if len(names) < 10:
        labels = np.arange(len(gains))
    sums, counts = np.bincount(labels, weights=gains), np.bincount(labels)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
