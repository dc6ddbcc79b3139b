"""What several rewards look like beside each other before training: their scales, and whether they ask for the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from tiller.reward_spec import Scale
from tiller.rewards.call import Reward, reward_name
from tiller.rewards.mix import Mix
from tiller.types import RewardError, Scores

ALIKE = 0.95  # correlation above which two rewards ask for the same
OPPOSED = -0.5  # correlation below which they pull against each other
LARGER = 10.0  # times the largest of the others: a reward that much larger leaves them no say


@dataclass(frozen=True)
class Summary:
    """One reward's raw scores."""

    mean: float | None  # None where no score is there
    std: float | None  # with N in the denominator
    min: float | None
    max: float | None
    missing: float  # the share of the scores that are missing
    weight: float = 1.0
    scale: Scale | None = None  # by which the score is normalised


@dataclass(frozen=True)
class Beside:
    """The rewards of a recipe on the trial's pictures."""

    pictures: int
    rewards: Mapping[str, Summary]
    correlations: Sequence[Sequence[float | None]] = ()  # in the order of `rewards`; None where one does not vary
    warnings: Sequence[str] = field(default_factory=tuple)

    def to_data(self) -> dict[str, Any]:
        """As plain data, for a JSON file."""
        return asdict(self)


def scaled(reward: Reward, scores: Scores) -> Reward:
    """The reward with the scales that are to be measured, measured: mean and std of the trial's raw scores.

    Raises:
        RewardError: a reward that is to be normalised gave one and the same score, or none.
    """
    if not isinstance(reward, Mix):
        return reward
    return with_scales(reward, {part.label: _measure(part.label, scores) for part in reward.parts if part.unmeasured})


def with_scales(reward: Reward, scales: Mapping[str, Scale]) -> Reward:
    """The reward with these scales, by label."""
    if not isinstance(reward, Mix):
        return reward
    return Mix(tuple(replace(part, scale=scales.get(part.label, part.scale)) for part in reward.parts))


def scales(reward: Reward) -> dict[str, Scale]:
    """The scales a reward has, by label."""
    return {part.label: part.scale for part in reward.parts if part.scale} if isinstance(reward, Mix) else {}


def unmeasured(reward: Reward | None) -> list[str]:
    """The labels of the rewards that are to be normalised and have no scale yet."""
    return [part.label for part in reward.parts if part.unmeasured] if isinstance(reward, Mix) else []


def beside(reward: Reward, scores: Scores) -> Beside:
    """Every reward's scale on N pictures, the correlation of each two, and what is odd about them."""
    if isinstance(reward, Mix):
        columns = {part.label: scores.components[part.label] for part in reward.parts}
        weights = {part.label: part.weight for part in reward.parts}
    else:
        columns, weights = {reward_name(reward): scores.values}, {}
    known = scales(reward)
    found = {name: _summary(column, weights.get(name, 1.0), known.get(name)) for name, column in columns.items()}
    table = correlations(list(columns.values()))
    return Beside(len(scores.values), found, table, tuple(_warnings(found, table)))


def correlations(columns: Sequence[np.ndarray]) -> list[list[float | None]]:
    """Pearson's r of each two, over the pictures that have both scores; None where one of them does not vary."""
    return [[_correlation(one, other) for other in columns] for one in columns]


def _correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    both = np.isfinite(one) & np.isfinite(other)
    if both.sum() < 2 or np.ptp(one[both]) == 0 or np.ptp(other[both]) == 0:
        return None
    return float(np.corrcoef(one[both], other[both])[0, 1])


def _measure(label: str, scores: Scores) -> Scale:
    column = scores.components[label]
    known = column[np.isfinite(column)]
    if len(known) < 2 or np.ptp(known) == 0:
        what = f"the same score ({known[0]:g})" if len(known) else "no score"
        raise RewardError(
            f"reward {label} cannot be normalised: it gave {what} to all of {len(column)} pictures; give its scale as "
            "numbers (normalise: {mean: ..., std: ...}), or leave normalise out."
        )
    return Scale(float(known.mean()), float(known.std()))


def _summary(column: np.ndarray, weight: float, scale: Scale | None) -> Summary:
    known = column[np.isfinite(column)]
    missing = 1 - len(known) / len(column) if len(column) else 0.0
    if not len(known):
        return Summary(None, None, None, None, missing, weight, scale)
    mean, std = float(known.mean()), float(known.std())
    return Summary(mean, std, float(known.min()), float(known.max()), missing, weight, scale)


def _warnings(found: Mapping[str, Summary], table: Sequence[Sequence[float | None]]) -> list[str]:
    names = list(found)
    said = [
        f"{name} does not vary on these pictures, so it says nothing about them."
        for name, one in found.items()
        if one.std == 0
    ]
    for row, one in enumerate(names):
        for column, other in enumerate(names[:row]):
            r = table[row][column]
            if r is not None and r > ALIKE:
                said.append(f"{other} and {one} ask for nearly the same (correlation {r:.2f}); one of them may do.")
            if r is not None and r < OPPOSED:
                said.append(f"{other} and {one} pull against each other (correlation {r:.2f}); look at their weights.")
    shares = {name: _share(one) for name, one in found.items() if one.weight}
    for name, share in shares.items():
        rest = max((other for key, other in shares.items() if key != name), default=0.0)
        if found[name].scale is None and rest > 0 and share >= LARGER * rest:
            said.append(
                f"{name} varies {share / rest:.0f} times as much in the sum as any other reward (weight x std is "
                f"{share:.3g} against {rest:.3g}), which leaves them no say; normalise it, or lower its weight."
            )
    return said


def _share(one: Summary) -> float:
    """How much a reward moves the sum: |weight| x std, in units of its scale."""
    return abs(one.weight) * (one.std or 0.0) / (one.scale.std if one.scale else 1.0)
