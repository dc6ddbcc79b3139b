"""What a reward returned, checked entry by entry: numbers, None, or a `Score`, one per picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from tiller.rewards.redact import redacted
from tiller.types import RewardError, Score


@dataclass(frozen=True)
class Column:
    """One list of scores."""

    values: np.ndarray  # (N,) float64, NaN = missing
    reasons: dict[int, str]  # index -> why that score is missing
    notes: dict[int, str]  # index -> what the reward said of it


def column(name: str, result: Any, prompts: Sequence[str], what: str = "image") -> Column:
    """N entries as numbers, with NaN where a score is missing, and why it is.

    Raises:
        RewardError: it is not one number, None or `Score` for each of the N prompts; `what` is what was scored.
    """
    rows = _rows(name, result, len(prompts), what)
    values = np.full(len(rows), np.nan)
    reasons: dict[int, str] = {}
    notes: dict[int, str] = {}
    for index, row in enumerate(rows):
        said = row if isinstance(row, Score) else Score(row)
        number = _number(name, said.value, f"{what} {index} ({prompts[index]!r})")
        if number is not None and math.isfinite(number):
            values[index] = number
        else:
            why = "None" if number is None else "NaN" if math.isnan(number) else str(number)
            reasons[index] = redacted(said.reason) or why
        if said.note:
            notes[index] = redacted(said.note)
    return Column(values, reasons, notes)


def _rows(name: str, result: Any, expected: int, what: str) -> list[Any]:
    """The scores as a plain list; arrays and tensors of any kind know `tolist`."""
    rows = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(rows, (list, tuple)):
        raise RewardError(
            f"reward {name} returned {in_words(result)} for {expected} {what}(s); return a list of one number "
            f"per {what}, None where there is no score."
        )
    if any(isinstance(_plain(row), (list, tuple)) for row in rows):
        shape = "x".join(map(str, getattr(result, "shape", ()))) or "nested"
        raise RewardError(
            f"reward {name} returned a {shape} list of lists; return a flat list of one number per {what}, "
            "or a mapping of named lists."
        )
    if len(rows) != expected:
        raise RewardError(
            f"reward {name} returned {len(rows)} score(s) for {expected} {what}(s); return one per {what}, "
            "None where there is no score."
        )
    return list(rows)


def _plain(row: Any) -> Any:
    """A numpy or torch number as a Python one."""
    return row.tolist() if hasattr(row, "tolist") else row


def _number(name: str, row: Any, where: str) -> float | None:
    """One score; a text, a truth value or a complex number is a mistake, not a score."""
    row = _plain(row)
    if row is None:
        return None
    if isinstance(row, bool) or not isinstance(row, Real):
        cure = "1.0 or 0.0" if isinstance(row, bool) else "a number, or None where there is no score"
        raise RewardError(f"reward {name} returned {in_words(row)} for {where}; return {cure}.")
    try:
        return float(row)
    except OverflowError:
        return math.inf


def in_words(value: Any) -> str:
    """A value in words, for a message."""
    if value is None:
        return "None"
    kinds = {str: "text", bool: "a truth value", complex: "a complex number"}
    kind = kinds.get(type(value), f"a {type(value).__name__}")
    text = redacted(repr(value))
    return f"{kind} ({text if len(text) <= 60 else text[:57] + '...'})"
