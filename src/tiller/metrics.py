"""The numbers of an epoch: what the scores looked like, means over everything added up, seconds, memory."""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from tiller.advantages import zero_spread_groups
from tiller.distributed import World
from tiller.types import Scores


def score_metrics(scores: Scores, group_size: int) -> dict[str, float]:
    """Mean and spread of an epoch's scores and of each of their components; how many are missing or teach nothing."""
    values = scores.values
    metrics = {"reward/missing": float((~scores.valid).sum())}
    for name, column in [("reward", values), *((f"reward/{part}", c) for part, c in scores.components.items())]:
        present = column[np.isfinite(column)]
        if len(present):
            metrics[f"{name}/mean"] = float(present.mean())
            metrics[f"{name}/std"] = float(present.std())
    if group_size > 1:
        groups = [index // group_size for index in range(len(values))]
        metrics["reward/zero_spread_groups"] = float(zero_spread_groups(values, groups))
    return metrics


def memory(device: torch.device) -> dict[str, float]:
    """GB that this process holds now, and the most that it has held on the device; for the timings, as it varies."""
    found = {}
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        found["memory/gb"] = pages * os.sysconf("SC_PAGE_SIZE") / 1e9
    if device.type == "cuda":
        found["memory/device_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return found


class Log:
    """Numbers by name, and how often each came, for their means."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = defaultdict(list)

    def add(self, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            self.values[name].append(number)

    def means(self, world: World) -> dict[str, float]:
        """The mean of each name over everything added in any process; of names ending in `_max`, the largest."""
        everyone = world.gather([dict(self.values)])
        joined: dict[str, list[float]] = defaultdict(list)
        for values in everyone:
            for name, numbers in values.items():
                joined[name] += numbers
        return {
            name: float(np.max(numbers) if name.endswith("_max") else np.mean(numbers))
            for name, numbers in sorted(joined.items())
        }


class Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now
