"""What a reward returned, as results to send. Needs no tiller: any object of a `Score`'s shape is one."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from .protocol import Request, Result, plain, total


class Wrong(Exception):
    """A reward that returns anything but one score per picture; no further call mends it."""


def answer(reward: Callable[..., Any], request: Request, alone: bool) -> list[Result]:
    """One result per picture. Where the reward fails on all of them together, it is asked about each by itself, so that
    one bad picture costs one score; with `alone` false (a reward that compares pictures) it is not.

    Raises:
        Wrong: the reward returned something else.
        Exception: what a reward that compares pictures raised.
    """
    try:
        raw = _called(reward, request)
    except (Exception, SystemExit) as error:
        if not alone:
            raise
        if len(request.images) == 1:
            return [Result(None, f"{type(error).__name__}: {plain(str(error), 300)}")]
    else:
        return _results(raw, len(request.images))
    return [result for one in _singles(request) for result in answer(reward, one, alone)]


def _singles(request: Request) -> list[Request]:
    rows = zip(request.images, request.prompts, request.metadata, strict=True)
    return [Request([image], [prompt], [entry]) for image, prompt, entry in rows]


def _called(reward: Callable[..., Any], request: Request) -> Any:
    raw = reward(list(request.images), list(request.prompts), list(request.metadata))
    return asyncio.run(raw) if inspect.iscoroutine(raw) else raw


def _results(raw: Any, count: int) -> list[Result]:
    if not isinstance(raw, Mapping):
        return _column(raw, count)
    if not raw or not all(isinstance(name, str) for name in raw):
        raise Wrong("a reward's mapping must name each list of scores")
    columns = {name: _column(part, count) for name, part in raw.items()}
    return [_joined({name: column[index] for name, column in columns.items()}) for index in range(count)]


def _joined(parts: Mapping[str, Result]) -> Result:
    """The named scores of one picture, and their sum."""
    values = {name: part.value for name, part in parts.items()}
    reasons = [f"{name}: {part.reason}" for name, part in parts.items() if part.value is None]
    notes = [f"{name}: {part.note}" for name, part in parts.items() if part.note]
    return Result(total(values), "; ".join(reasons), "; ".join(notes), values)


def _column(raw: Any, count: int) -> list[Result]:
    rows = raw.tolist() if hasattr(raw, "tolist") else raw
    if not isinstance(rows, (list, tuple)) or len(rows) != count:
        what = f"{len(rows)} scores" if isinstance(rows, (list, tuple)) else type(raw).__name__
        raise Wrong(f"the reward returned {what} for {count} picture(s)")
    return [_entry(row) for row in rows]


def _entry(row: Any) -> Result:
    """A number, None, or whatever has a value, a reason and a note."""
    reason, note = "", ""
    if hasattr(row, "value") and hasattr(row, "reason"):
        row, reason, note = row.value, str(row.reason), str(getattr(row, "note", ""))
    row = row.tolist() if hasattr(row, "tolist") else row
    if row is None:
        return Result(None, reason or "None", note)
    if isinstance(row, bool) or not isinstance(row, Real):
        raise Wrong(f"the reward returned {plain(repr(row), 60)} in the place of a number")
    number = float(row)
    return Result(number, reason, note) if math.isfinite(number) else Result(None, reason or str(number), note)
