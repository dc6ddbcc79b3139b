"""What passes between the rooms: frozen dataclasses, the shape of every tensor beside its field.

B is the number of samples in one recorded batch, T the number of denoising steps, N the number of samples in an
epoch (all batches, all processes together).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


class TillerError(Exception):
    """A fault the user can cure; its message is one sentence that names the thing and the cure."""


class ConfigError(TillerError):
    """A setting is unknown, of the wrong type, or contradicts another one."""


class RewardError(TillerError):
    """A reward function failed or returned something that is not one score per image."""


class RewardTimeout(RewardError):
    """A reward function did not answer in time; threads of it may still hang."""


class ServiceError(RewardError):
    """The server behind a reward is away or refuses; the message says all there is to say."""


class PipelineError(TillerError):
    """A pipeline cannot be loaded, driven or trained."""


class RunError(TillerError):
    """A run folder cannot be written, read or resumed."""


@dataclass(frozen=True)
class Prompt:
    """One thing to ask for: the text, and whatever a reward may want to know about it."""

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """What a reward may say of one picture, in the place of a bare number: why there is none, and what to keep."""

    value: float | None  # None is missing
    reason: str = ""  # why it is missing
    note: str = ""  # kept in the log beside the score, such as a judge's own words


@dataclass(frozen=True)
class Scores:
    """Rewards of N pictures. A missing score is NaN; it takes part in no statistic and no update."""

    values: np.ndarray  # (N,) float64, NaN = missing
    components: Mapping[str, np.ndarray] = field(default_factory=dict)  # each (N,) float64, for the log only
    reasons: Mapping[int, str] = field(default_factory=dict)  # index -> why that score is missing
    notes: Mapping[int, str] = field(default_factory=dict)  # index -> what the reward said of it, for the log only

    @property
    def valid(self) -> np.ndarray:
        """(N,) bool: the score is there and finite."""
        return np.isfinite(self.values)


def join_scores(parts: Sequence[Scores]) -> Scores:
    """The scores of several batches, one after the other; a component that a batch lacks is missing there."""
    names = dict.fromkeys(name for part in parts for name in part.components)
    starts = np.cumsum([0, *(len(part.values) for part in parts)])
    return Scores(
        np.concatenate([part.values for part in parts]),
        {
            name: np.concatenate([part.components.get(name, np.full(len(part.values), np.nan)) for part in parts])
            for name in names
        },
        {int(start) + at: why for start, part in zip(starts, parts, strict=False) for at, why in part.reasons.items()},
        {int(start) + at: note for start, part in zip(starts, parts, strict=False) for at, note in part.notes.items()},
    )
