"""Over-optimisation, seen: what each evaluation during a run lost while the reward rose, by rules with thresholds.

The reward that is optimised is a stand-in for what is wanted (Gao et al. 2022, "Scaling Laws for Reward Model
Overoptimization", 2210.10760). So every evaluation also holds what that reward does not see against the model before
training, on the same prompts and noise: other rewards on prompts never trained on, how much pictures of one prompt
differ, how far the paths have moved, and what pictures look like at large.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tiller.evaluation.paired import Comparison
from tiller.settings import MonitorRules


@dataclass(frozen=True)
class Seen:
    """One evaluation during a run, beside the model before training."""

    epoch: int
    compared: Mapping[str, Comparison]  # reward -> over all held-out pictures, or over the trained where there are none
    trained: str | None  # which of these is optimised
    statistics: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # name -> (base, now)
    diversity: tuple[float, float] | None = None  # (base, now) mean distance of two pictures of one prompt
    distance: float | None = None  # mean distance of a picture from the base model's of the same noise
    kl: float | None = None  # nats per picture; None where there is no base left to ask

    def to_data(self) -> dict[str, Any]:
        """As plain data, for a line of JSON."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Seen:
        """Back from `to_data`."""
        compared = {name: Comparison(**one) for name, one in data["compared"].items()}
        statistics = {name: (before, now) for name, (before, now) in data["statistics"].items()}
        differ = None if data["diversity"] is None else (data["diversity"][0], data["diversity"][1])
        return cls(data["epoch"], compared, data["trained"], statistics, differ, data.get("distance"), data["kl"])


@dataclass(frozen=True)
class Finding:
    """One thing that was lost."""

    rule: str
    measured: float
    threshold: float
    text: str


def findings(seen: Seen, rules: MonitorRules) -> list[Finding]:
    """What an evaluation lost by the rules; nothing, if the action is off."""
    return [] if rules.action == "off" else list(_findings(seen, rules))


def _findings(seen: Seen, rules: MonitorRules) -> Iterator[Finding]:
    for name, found in seen.compared.items():
        if name != seen.trained and found.high < -rules.lost:
            text = f"{name} fell by {-found.difference:.3g} (95 % {-found.high:.3g} to {-found.low:.3g})"
            yield Finding("lost", found.difference, -rules.lost, text)
    if seen.diversity is not None and seen.diversity[0] > 0:
        left = seen.diversity[1] / seen.diversity[0]
        if left < rules.diversity:
            text = f"pictures of one prompt differ by {left:.0%} of what they did"
            yield Finding("diversity", left, rules.diversity, text)
    if rules.kl is not None and seen.kl is not None and seen.kl > rules.kl:
        yield Finding("kl", seen.kl, rules.kl, f"the paths have moved by {seen.kl:.0f} nats per picture")
    yield from _drifted(seen.statistics, rules)


def _drifted(statistics: Mapping[str, tuple[float, float]], rules: MonitorRules) -> Iterator[Finding]:
    if "edges" in statistics and statistics["edges"][0] > 0:
        change = statistics["edges"][1] / statistics["edges"][0] - 1
        if abs(change) > rules.edges:
            yield Finding("edges", change, rules.edges, f"the pictures' edges changed by {change:+.0%}")
    if "blank" in statistics:
        more = statistics["blank"][1] - statistics["blank"][0]
        if more > rules.blank:
            yield Finding("blank", more, rules.blank, f"{more:.0%} more of the pictures is blank")


@dataclass(frozen=True)
class Verdict:
    """What one evaluation means for the run."""

    findings: Sequence[Finding]
    acts: bool  # patience is over: do what the rules say
    best: bool  # nothing was lost, and no earlier evaluation scored higher


class Monitor:
    """What a run's evaluations have come to so far: a function of what was seen, in order."""

    def __init__(self, rules: MonitorRules):
        self.rules = rules
        self.in_a_row = 0  # evaluations that found something, up to now
        self.best: tuple[int, float] | None = None  # (epoch, score) of the best one that lost nothing
        self.acted: list[int] = []  # epochs at which patience was over

    def see(self, seen: Seen) -> Verdict:
        """Judge one evaluation. The best is the one with the highest held-out score of those that lost nothing.

        The score is the trained reward's mean, or the first reported one's where none is trained.
        """
        found = findings(seen, self.rules)
        self.in_a_row = self.in_a_row + 1 if found else 0
        score = self._score(seen)
        best = not found and score is not None and (self.best is None or score > self.best[1])
        if best and score is not None:
            self.best = (seen.epoch, score)
        acts = self.in_a_row >= self.rules.patience and self.rules.action not in ("warn", "off")
        if acts:
            self.acted.append(seen.epoch)
            self.in_a_row = 0
        return Verdict(found, acts, best)

    @property
    def ended(self) -> bool:
        """Whether the rules have stopped the run."""
        return bool(self.acted) and self.rules.action in ("stop", "roll_back")

    @property
    def rate(self) -> float:
        """What the learning rate has come to be multiplied by."""
        return self.rules.rate_factor ** len(self.acted) if self.rules.action == "lower_rate" else 1.0

    @staticmethod
    def _score(seen: Seen) -> float | None:
        name = seen.trained if seen.trained in seen.compared else next(iter(seen.compared), None)
        return None if name is None else seen.compared[name].tuned


def in_words(verdict: Verdict) -> str:
    """One line for the terminal."""
    return "over-optimised? " + "; ".join(found.text for found in verdict.findings)
