"""The diagnosis: what the numbers of a run say is wrong with it, in sentences with the number and the cure.

Each rule of `tiller.report.rules` is a pure function from a run's record to a finding or none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tiller.report.record import Record

Level = Literal["problem", "warning", "note"]
LEVELS: tuple[Level, ...] = ("problem", "warning", "note")
PAGE = "docs/diagnosis.md"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    name: str  # of the rule; its heading on the page, with hyphens
    level: Level  # problem: the run cannot learn, or what it says is not so; warning: it learns less than it could
    sentence: str  # with the measured number
    cure: str

    @property
    def page(self) -> str:
        """Where the rule is explained."""
        return f"{PAGE}#{self.name.replace('_', '-')}"

    def __str__(self) -> str:
        return f"{self.level}: {self.sentence} {self.cure} ({self.page})"


@dataclass(frozen=True)
class Limits:
    """From where on a rule speaks. The defaults stay silent on the runs of docs/log.md that learned."""

    no_spread: float = 0.5  # share of groups whose pictures all have one score
    clip_fraction: float = 0.8  # share of samples outside the clip range, in the updates after the first
    kl_ratio: float = 10.0  # KL penalty over what the ratios move the policy term by
    flat_epochs: int = 20  # fewer say nothing about a trend
    flat_t: float = 2.0  # slope of the mean reward over its standard error, below which it is flat
    falling_t: float = -3.0
    growth: float = 20.0  # of the gradient's norm, from the first third of the epochs to the last
    skipped: float = 0.01  # share of updates whose gradient was not finite
    missing: float = 0.02  # share of scores
    memory_growth: float = 0.2  # from the second tenth of the epochs to the last, and at least half a GB
    memory_gb: float = 0.5
    waiting: float = 0.25  # share of an epoch that is spent waiting for scores alone
    explained: float = -0.25  # variance that the value network explains; below 0 it is worse than the mean
    first_log_ratio: float = 1e-3  # where new and old policy are the same weights
    diversity: float = 0.5  # share of the pictures' diversity that is left
    saturated: float = 0.05  # spread of the scores, over what it was in the first epochs
    dropped: float = 0.5  # share of paths that adjoint matching leaves out
    below_target: float = 0.05  # share of pictures below ReFL's target


Rule = Callable[[Record, Limits], Finding | None]


def diagnose(record: Record, limits: Limits | None = None) -> list[Finding]:
    """Every finding, the gravest first."""
    from tiller.report.rules import RULES

    chosen = limits or Limits()
    found = [finding for rule in RULES if (finding := rule(record, chosen)) is not None]
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def lines(findings: Sequence[Finding], most: int = 3) -> list[str]:
    """The gravest findings, a line each, and how many more there are; never more than `most` lines."""
    if len(findings) <= most:
        return [str(finding) for finding in findings]
    rest = len(findings) - most + 1
    return [*(str(finding) for finding in findings[: most - 1]), f"and {rest} findings more: tiller diagnose"]


def late(values: np.ndarray) -> np.ndarray:
    """The last third of a run's epochs, one at least, without those that lack the number."""
    kept = values[-max(1, len(values) // 3) :]
    return kept[np.isfinite(kept)]


def early(values: np.ndarray) -> np.ndarray:
    """The first third, likewise."""
    kept = values[: max(1, len(values) // 3)]
    return kept[np.isfinite(kept)]


def trend(values: np.ndarray) -> float:
    """The t-statistic of the least-squares slope over epochs; NaN with fewer than three of them, or no scatter."""
    at = np.flatnonzero(np.isfinite(values)).astype(float)
    known = values[np.isfinite(values)]
    if len(known) < 3:
        return float("nan")
    centred = at - at.mean()
    slope = (centred @ known) / (centred @ centred)
    rest = known - known.mean() - slope * centred
    error = np.sqrt((rest @ rest) / (len(known) - 2) / (centred @ centred))
    return float(slope / error) if error > 0 else float("nan")
