"""The contract of a reward: `(images, prompts, metadata) -> one score per image`, checked at the door.

A score that is None, NaN or infinite is missing: it becomes NaN with a reason, and is left out of every
statistic and update. It never becomes 0: in a group of .80 .82 .84 .86, a 0 in place of the last one turns
the best picture into the one that is pushed away from.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from numbers import Real
from pathlib import Path
from traceback import walk_tb
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from tiller.rewards.gradient import as_tensor, differentiable
from tiller.types import RewardError, RewardTimeout, Scores

Reward = Callable[[Any, list[str], list[Mapping[str, Any]]], Any]
"""What a reward is. It gets N pictures, as PIL images or, where it says `differentiable = True`, as one tensor. It
returns a list, tuple, array or tensor of N numbers (None or NaN where a score is missing), or a mapping from names to
such lists. An `async def` is one too."""


def score(
    reward: Reward,
    images: Sequence[Image],
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    weights: Mapping[str, float] | None = None,
) -> Scores:
    """Call `reward` on N pictures and return N checked scores.

    Where it returns named lists, the total is their sum, or their sum weighted by `weights`, which must
    name each of them; a weight of 0 keeps a list for the log alone. The total is missing where any list
    that counts is.

    Raises `RewardError` if the function raises, or returns anything but one number (or None) per picture.
    """
    if not len(images) == len(prompts) == len(metadata):
        raise RewardError(
            f"{len(images)} images, {len(prompts)} prompts and {len(metadata)} metadata entries do not "
            "belong together; give one of each per picture."
        )
    if not images:
        return Scores(np.empty(0))
    result = _call(reward, list(images), list(prompts), list(metadata))
    name = reward_name(reward)
    if not isinstance(result, Mapping):
        if weights:
            raise RewardError(
                f"reward {name} returned one list of scores, so there is nothing to weigh; drop the weights."
            )
        values, reasons = _column(name, result, prompts)
        return Scores(values, {}, reasons)
    return _total(name, result, weights, prompts)


def reward_name(reward: object) -> str:
    """What to call a reward in a message and in the log: its function's name, or its class's."""
    if isinstance(reward, partial):
        return reward_name(reward.func)
    return getattr(reward, "__name__", type(reward).__name__)


def _call(reward: Reward, images: list[Image], prompts: list[str], metadata: list[Mapping[str, Any]]) -> Any:
    """The raw answer; a failure names the function and the prompts it had in hand."""
    try:
        if differentiable(reward):
            with torch.no_grad():
                return reward(as_tensor(images), prompts, metadata)
        result = reward(images, prompts, metadata)
        return _wait(result) if inspect.iscoroutine(result) else result
    except RewardTimeout:
        raise
    except Exception as error:
        different = list(dict.fromkeys(prompts))
        asked = ", ".join(repr(prompt) for prompt in different[:3]) + (", ..." if len(different) > 3 else "")
        detail = (f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) + _line(reward, error)
        raise RewardError(
            f"reward {reward_name(reward)} failed on {len(images)} image(s) of {asked}: {detail}; "
            "mend it, or return None for a picture it cannot score."
        ) from error


def _line(reward: object, error: Exception) -> str:
    """Where in the reward's own source it happened, if that can be told."""
    code = getattr(inspect.unwrap(reward), "__code__", None)  # type: ignore[arg-type]
    lines = [number for frame, number in walk_tb(error.__traceback__) if frame.f_code is code]
    return f" ({Path(code.co_filename).name}:{lines[-1]})" if code and lines else ""


def _wait(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine, also where an event loop already runs in this thread (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


def _total(name: str, parts: Mapping[Any, Any], weights: Mapping[str, float] | None, prompts: Sequence[str]) -> Scores:
    """The weighted sum of named scores, and each of them for the log."""
    if not parts or not all(isinstance(part, str) for part in parts):
        raise RewardError(f"reward {name} returned a mapping without names; return {{'name': [one score per image]}}.")
    if weights is not None and set(weights) != set(parts):
        raise RewardError(
            f"reward {name} returned the scores {_names(parts)} but the weights name {_names(weights)}; "
            "give each score a weight (0 only logs it)."
        )
    columns = {part: _column(f"{name}[{part}]", column, prompts) for part, column in parts.items()}
    total = np.zeros(len(prompts))
    reasons: dict[int, str] = {}
    for part, (values, missing) in columns.items():
        weight = 1.0 if weights is None else weights[part]
        if weight == 0:
            continue
        total = total + weight * values
        for index, reason in missing.items():
            reasons.setdefault(index, f"{part}: {reason}")
    return Scores(total, {part: values for part, (values, _) in columns.items()}, reasons)


def _names(mapping: Mapping[Any, Any]) -> str:
    return ", ".join(sorted(map(str, mapping))) or "nothing"


def _column(name: str, result: Any, prompts: Sequence[str]) -> tuple[np.ndarray, dict[int, str]]:
    """(N,) float64 with NaN where a score is missing, and why it is."""
    rows = _rows(name, result, len(prompts))
    values = np.full(len(rows), np.nan)
    reasons: dict[int, str] = {}
    for index, row in enumerate(rows):
        number = _number(name, row, f"image {index} ({prompts[index]!r})")
        if number is not None and math.isfinite(number):
            values[index] = number
        else:
            reasons[index] = "None" if number is None else "NaN" if math.isnan(number) else str(number)
    return values, reasons


def _rows(name: str, result: Any, expected: int) -> list[Any]:
    """The scores as a plain list; arrays and tensors of any kind know `tolist`."""
    rows = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(rows, (list, tuple)):
        raise RewardError(
            f"reward {name} returned {_what(result)} for {expected} image(s); return a list of one number "
            "per image, None where there is no score."
        )
    if any(isinstance(_plain(row), (list, tuple)) for row in rows):
        shape = "x".join(map(str, getattr(result, "shape", ()))) or "nested"
        raise RewardError(
            f"reward {name} returned a {shape} list of lists; return a flat list of one number per image, "
            "or a mapping of named lists."
        )
    if len(rows) != expected:
        raise RewardError(
            f"reward {name} returned {len(rows)} score(s) for {expected} image(s); return one per image, "
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
        raise RewardError(f"reward {name} returned {_what(row)} for {where}; return {cure}.")
    try:
        return float(row)
    except OverflowError:
        return math.inf


def _what(value: Any) -> str:
    """A value in words, for a message."""
    if value is None:
        return "None"
    kinds = {str: "text", bool: "a truth value", complex: "a complex number"}
    kind = kinds.get(type(value), f"a {type(value).__name__}")
    text = repr(value)
    return f"{kind} ({text if len(text) <= 60 else text[:57] + '...'})"
