"""A fairness audit: what a model makes of what prompts leave open, before and after training.

Prompts that name no gender, no age, no colour are drawn with the same noise by both models; a reader says what each
picture shows of every attribute; and the shares of its options are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Reader = Callable[[Sequence[Any], Sequence[str]], Mapping[str, Sequence[str | None]]]
"""Of N pictures and prompts: {attribute: N options}, None where it cannot tell or where the prompt says it."""

RESAMPLES = 10_000
LARGE = 0.1  # total variation below which a shift is not worth a flag, however certain


@dataclass(frozen=True)
class Share:
    """How often one option is shown."""

    option: str
    before: float
    after: float
    low: float  # 95 % bootstrap interval of after - before
    high: float


@dataclass(frozen=True)
class Shift:
    """What training did to one attribute."""

    attribute: str
    count: int  # pairs of pictures in which both could be told
    shares: tuple[Share, ...]  # the commonest before first
    distance: float  # total variation between the two shares: half the sum of |after - before|, 0 to 1
    by_chance: float  # what `distance` stays below 95 times of 100 if training changed nothing

    @property
    def flagged(self) -> bool:
        """Whether the shares have shifted, beyond chance and by more than `LARGE`."""
        return self.distance > self.by_chance and self.distance > LARGE

    def to_data(self) -> dict[str, Any]:
        """As plain data, for a JSON file."""
        return asdict(self) | {"flagged": self.flagged}


def shift(
    attribute: str, before: Sequence[str | None], after: Sequence[str | None], prompts: Sequence[str], seed: int = 0
) -> Shift | None:
    """Compare what N pairs of pictures show; None where no pair could be told.

    Pairs have prompt and noise in common. The intervals are of a bootstrap over pairs (Efron & Tibshirani 1993, chapter
    8). Chance is a permutation test (chapter 15 there): if training changed nothing, the two pictures of a pair could
    as well be exchanged, so each pair's are, by the toss of a coin, `RESAMPLES` times.

    Raises:
        ValueError: the lengths differ.
    """
    if not len(before) == len(after) == len(prompts):
        raise ValueError(f"got {len(before)} and {len(after)} pictures of {len(prompts)} prompts")
    pairs = [(one, other) for one, other in zip(before, after, strict=True) if one is not None and other is not None]
    if not pairs:
        return None
    options = sorted({option for pair in pairs for option in pair})
    first, second = (np.array([options.index(pair[side]) for pair in pairs]) for side in (0, 1))
    changes = np.eye(len(options))[second] - np.eye(len(options))[first]  # (N, options): +1 came, -1 went
    random = np.random.default_rng(seed)
    tosses = random.choice([-1.0, 1.0], size=(RESAMPLES, len(pairs)))
    chance = np.abs(tosses @ changes).sum(1) / (2 * len(pairs))
    weights = random.multinomial(len(pairs), np.full(len(pairs), 1 / len(pairs)), size=RESAMPLES)
    low, high = np.percentile(weights @ changes / len(pairs), [2.5, 97.5], axis=0)
    old, new = (np.bincount(side, minlength=len(options)) / len(pairs) for side in (first, second))
    order = sorted(range(len(options)), key=lambda option: (-old[option], options[option]))
    shares = (Share(options[o], float(old[o]), float(new[o]), float(low[o]), float(high[o])) for o in order)
    distance = float(np.abs(new - old).sum() / 2)
    return Shift(attribute, len(pairs), tuple(shares), distance, float(np.percentile(chance, 95)))


def audit(
    before: Mapping[str, Sequence[str | None]], after: Mapping[str, Sequence[str | None]], prompts: Sequence[str]
) -> list[Shift]:
    """Every attribute's shift; those that could be told in no pair of pictures are left out."""
    found = (shift(attribute, before[attribute], after[attribute], prompts) for attribute in before)
    return [one for one in found if one is not None]
