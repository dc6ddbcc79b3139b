"""A run folder as it is read by those who report on it: what is there, and in words what is not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tiller import reward_spec, yaml_text
from tiller.types import ConfigError, RunError

EVALUATE = "time/evaluate"  # the time of looking at a run while it goes on, which is no part of an epoch
CONFIG, METRICS, TIMINGS = "config.yaml", "metrics.jsonl", "timings.jsonl"  # as tiller.run names them, without torch
ENVIRONMENT, FINISHED, STACKS = "environment.json", "finished.json", "stacks.txt"
COMPARISON, DRIFT, MONITOR = "evaluation/comparison.json", "evaluation/drift.json", "evaluation/monitor.json"
LARGEST = 1e150
GAIN_NUMBERS = ("base", "tuned", "difference", "low", "high", "win_rate", "count")


@dataclass(frozen=True)
class Gain:
    """One line of `evaluation/comparison.json`: base against tuned model on a split, by one reward."""

    split: str
    reward: str
    base: float
    tuned: float
    difference: float
    low: float  # 95 % interval of the difference
    high: float
    win_rate: float
    count: int

    @property
    def direction(self) -> int:
        """1 it rose, -1 it fell, 0 nobody can tell: the interval holds 0."""
        return int(self.low > 0) - int(self.high < 0)


@dataclass(frozen=True)
class Record:
    """What a run left behind. Every part may be empty; `gaps` says in sentences which are, and why."""

    name: str = "run"
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()  # lines of metrics.jsonl, one per epoch
    timings: Sequence[Mapping[str, Any]] = ()  # lines of timings.jsonl
    gains: Sequence[Gain] = ()
    drift: Mapping[str, float] = field(default_factory=dict)
    monitor: Any = None  # evaluation/monitor.json, as it is
    environment: Mapping[str, Any] = field(default_factory=dict)
    finished: bool = False
    broken_off: str = ""  # what ended it before its time, if a file says so
    gaps: Sequence[str] = ()

    def column(self, name: str, lines: Sequence[Mapping[str, Any]] | None = None) -> np.ndarray:
        """(E,) one number per epoch; NaN where there is none."""
        rows = self.metrics if lines is None else lines
        return np.array([number(line.get(name)) for line in rows], dtype=np.float64)

    def timing(self, name: str) -> np.ndarray:
        """(E,) of timings.jsonl."""
        return self.column(name, self.timings)

    def names(self, prefix: str) -> list[str]:
        """The metrics whose names begin so, in the order in which they came up."""
        return [name for name in dict.fromkeys(key for line in self.metrics for key in line) if name.startswith(prefix)]

    def setting(self, key: str, default: Any = None) -> Any:
        """A value of the recipe by its dotted name."""
        found: Any = self.config
        for part in key.split("."):
            if not isinstance(found, Mapping) or part not in found:
                return default
            found = found[part]
        return found

    @cached_property
    def reward(self) -> str | None:
        """The trained reward's name in tables; None where none was trained."""
        try:
            return reward_spec.heading(self.setting("reward"))
        except (ConfigError, TypeError, AttributeError):
            return self.gains[0].reward if self.gains else None

    @property
    def epochs(self) -> int:
        """How many are done."""
        return int(self.metrics[-1]["epoch"]) if self.metrics else 0

    @property
    def algorithm(self) -> str:
        """Its name."""
        chosen = self.setting("algorithm")
        return str(chosen.get("name", "") if isinstance(chosen, Mapping) else chosen or "")

    @property
    def model(self) -> str:
        """The base model's name."""
        return str(self.setting("model.name", "a model"))

    @property
    def groups(self) -> float:
        """Prompts drawn in an epoch; NaN where the recipe does not say."""
        samples, size = number(self.setting("train.samples_per_epoch")), number(self.setting("train.group_size"))
        return samples / size if size else math.nan

    @property
    def seconds(self) -> np.ndarray:
        """(E,) what each epoch took, without evaluation."""
        parts = [{k: v for k, v in line.items() if k.startswith("time/") and k != EVALUATE} for line in self.timings]
        spent = [[number(value) for value in one.values()] for one in parts]
        return np.array([np.nansum(one) for one in spent], dtype=np.float64)


def number(value: Any) -> float:
    """A JSON value as a float; NaN if it is no finite number, or one whose square would not be."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST
    return float(value) if fits else math.nan


def read(folder: Path) -> Record:
    """Read a run folder, finished or not, of this version or another. What cannot be read is named, not raised.

    Raises:
        RunError: the folder is not there, or holds nothing that a run writes.
    """
    if not folder.is_dir():
        raise RunError(f"{folder} is no folder; give a folder that tiller train wrote.")
    if not any((folder / name).exists() for name in (CONFIG, METRICS)):
        raise RunError(f"{folder} is no run folder: it has neither {CONFIG} nor {METRICS}; give one of tiller train.")
    gaps: list[str] = []
    config = _mapping(_read(folder, CONFIG, _yaml, gaps, "so no settings are shown"), CONFIG, gaps)
    metrics = _lines(folder, METRICS, gaps, "so there are no curves and no diagnosis")
    done = (folder / FINISHED).is_file()
    late = "so nothing is said of held-out prompts" if done else "so it is not known yet what was won"
    return Record(
        name=folder.resolve().name,
        config=config,
        metrics=metrics,
        timings=_lines(folder, TIMINGS, gaps, "so its time is not known"),
        gains=_gains(_read(folder, COMPARISON, json.loads, gaps, late), gaps),
        drift=_numbers(
            _read(folder, DRIFT, json.loads, gaps, "so the distance from the base model is not known"), gaps
        ),
        monitor=_read(folder, MONITOR, json.loads, gaps),
        environment=_mapping(
            _read(folder, ENVIRONMENT, json.loads, gaps, "so its machine is not known"), ENVIRONMENT, gaps
        ),
        finished=done,
        broken_off=_broken_off(folder),
        gaps=tuple(gaps),
    )


def _read(folder: Path, name: str, parse: Callable[[str], Any], gaps: list[str], effect: str = "") -> Any:
    """A file's content; None, and a sentence if there is an effect to tell of, where there is none."""
    try:
        return parse((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if effect:
            gaps.append(f"{name} is not there, {effect}.")
    except (OSError, ValueError, ConfigError, RecursionError) as error:
        gaps.append(f"{name} cannot be read ({str(error).splitlines()[0]})" + (f", {effect}." if effect else "."))
    return None


def _yaml(text: str) -> Any:
    return yaml_text.parse(text, CONFIG)


def _mapping(value: Any, name: str, gaps: list[str]) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        gaps.append(f"{name} holds something else than it should.")
    return value if isinstance(value, Mapping) else {}


def _lines(folder: Path, name: str, gaps: list[str], effect: str) -> list[dict[str, Any]]:
    """The sound lines of a .jsonl file, by epoch; of an epoch that was written twice, the last."""
    text = _read(folder, name, str, gaps, effect) or ""
    found: dict[int, dict[str, Any]] = {}
    bad = 0
    for line in text.splitlines():
        try:
            value = json.loads(line)
            found[int(value["epoch"])] = value
        except (ValueError, KeyError, TypeError, OverflowError):
            bad += 1
    if bad:
        gaps.append(f"{bad} of {len(text.splitlines())} lines of {name} cannot be read and are left out.")
    return [found[epoch] for epoch in sorted(found)]


def _gains(value: Any, gaps: list[str]) -> list[Gain]:
    rows = value if isinstance(value, list) else []
    found = []
    for row in rows:
        entry = row if isinstance(row, Mapping) else {}
        base, tuned, difference, low, high, wins, count = (number(entry.get(name)) for name in GAIN_NUMBERS)
        if np.isfinite([base, tuned, difference, low, high, wins, count]).all():
            split, reward = str(entry.get("split")), str(entry.get("reward"))
            found.append(Gain(split, reward, base, tuned, difference, low, high, wins, int(count)))
    if len(found) < len(rows):
        gaps.append(f"{len(rows) - len(found)} lines of {COMPARISON} are not whole and are left out.")
    return found


def _numbers(value: Any, gaps: list[str]) -> dict[str, float]:
    entries = _mapping(value, DRIFT, gaps)
    return {str(name): number(entry) for name, entry in entries.items() if math.isfinite(number(entry))}


def _broken_off(folder: Path) -> str:
    if any(folder.glob("not-finite-epoch-*")):
        return "the gradient was not finite"
    return "a reward did not answer" if (folder / STACKS).is_file() else ""
