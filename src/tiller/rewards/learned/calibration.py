"""How far a learned reward can be trusted: its probabilities against what was said, on prompts it was not fitted on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

BINS = 10


@dataclass(frozen=True)
class Bin:
    """Held-out answers whose probability lies in one tenth of [0, 1]."""

    low: float
    high: float
    count: int
    said: float  # mean probability
    was: float  # share that came true


@dataclass(frozen=True)
class Calibration:
    """What the probabilities p of N yes-or-no answers y are worth."""

    count: int
    accuracy: float  # share of answers on the likelier side; p = 0.5 counts half
    low: float  # 95 % interval of the accuracy
    high: float
    log_loss: float  # mean -log p(y), nats; 0.693 says nothing
    brier: float  # mean (p - y)² (Brier 1950); 0.25 says nothing
    error: float  # expected calibration error: Σ bins count/N · |said - was|
    bins: tuple[Bin, ...]
    chance: float = 0.5  # accuracy of always saying the same

    @property
    def beats_chance(self) -> bool:
        """Whether the whole interval of the accuracy lies above it."""
        return self.low > self.chance

    def to_data(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {"beats_chance": self.beats_chance}


def calibration(probabilities: Sequence[float], answers: Sequence[int], chance: float = 0.5) -> Calibration:
    """Of N probabilities and answers of 0 or 1.

    The bins of the expected calibration error are tenths of [0, 1] (Guo et al. 2017, 1706.04599, section 2). The
    interval is Wilson's (1927).

    Raises:
        ValueError: there are none, or not equally many.
    """
    p, y = np.asarray(probabilities, float), np.asarray(answers, float)
    if not len(p) or len(p) != len(y):
        raise ValueError(f"got {len(p)} probabilities and {len(y)} answers")
    right = np.where(p == 0.5, 0.5, (p > 0.5) == (y == 1))
    low, high = wilson(float(right.mean()), len(p))
    clipped = np.clip(p, 1e-12, 1 - 1e-12)
    places = np.minimum((p * BINS).astype(int), BINS - 1)
    bins = tuple(
        Bin(k / BINS, (k + 1) / BINS, int(here.sum()), float(p[here].mean()), float(y[here].mean()))
        for k in range(BINS)
        if (here := places == k).any()
    )
    return Calibration(
        len(p),
        float(right.mean()),
        low,
        high,
        float(-(y * np.log(clipped) + (1 - y) * np.log(1 - clipped)).mean()),
        float(((p - y) ** 2).mean()),
        sum(one.count * abs(one.said - one.was) for one in bins) / len(p),
        bins,
        chance,
    )


def wilson(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    middle, shrink = share + z * z / (2 * count), 1 + z * z / count
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (middle - half) / shrink, (middle + half) / shrink


def fit_temperature(differences: Sequence[float] | np.ndarray, answers: Sequence[float] | np.ndarray) -> float:
    """T that makes σ(difference / T) likeliest (Guo et al. 2017, section 4.2), by bisection of the derivative in 1/T.

    Where the answers can be separated, or the scores say nothing, T stays within [0.01, 100].
    """
    d, y = np.asarray(differences, float), np.asarray(answers, float)

    def slope(inverse: float) -> float:
        return float(((logistic(inverse * d) - y) * d).sum())

    low, high = 0.01, 100.0  # 1/T
    if slope(low) >= 0:
        return 1 / low
    if slope(high) <= 0:
        return 1 / high
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / math.sqrt(low * high)


def logistic(x: np.ndarray) -> np.ndarray:
    """1/(1 + e^-x), for any x."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))
