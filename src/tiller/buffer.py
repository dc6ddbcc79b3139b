"""The replay buffer: an epoch's updates may go through the samples of earlier epochs too (DPOK).

A path is a function of the seed, the epoch and the weights that drew it. So a checkpoint keeps these weights and the
scores, and a resumed run draws the paths again, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from tiller.walks import Chunk


@dataclass
class Earlier:
    """An earlier epoch's samples, and what drew them."""

    epoch: int
    weights: Mapping[str, Tensor]  # the trained parameters that drew them
    scores: np.ndarray  # (N,) float64, NaN where one is missing
    advantages: np.ndarray  # (N,) float64, NaN where a sample is left out
    chunks: Sequence[Chunk] | None = None  # of this process; None after a resume, until they are drawn again


class ReplayBuffer:
    """The latest `size` epochs."""

    def __init__(self, size: int):
        self.size = size
        self.epochs: list[Earlier] = []

    def add(self, epoch: Earlier) -> None:
        """Keep one more, and forget what is too old."""
        self.epochs = [*self.epochs, epoch][-self.size :] if self.size else []

    def tensors(self) -> dict[str, Tensor]:
        """The weights of every epoch, by name."""
        return {
            f"buffer.{place}.{name}": value
            for place, epoch in enumerate(self.epochs)
            for name, value in epoch.weights.items()
        }

    def data(self) -> list[dict[str, Any]]:
        """Scores and advantages of every epoch, None where one is missing."""
        return [
            {"epoch": one.epoch, "scores": _plain(one.scores), "advantages": _plain(one.advantages)}
            for one in self.epochs
        ]

    def load(self, tensors: Mapping[str, Tensor], data: Sequence[Mapping[str, Any]]) -> None:
        """Put back what `tensors` and `data` gave; the paths are missing yet."""
        self.epochs = []
        for place, one in enumerate(data):
            prefix = f"buffer.{place}."
            weights = {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}
            scores, advantages = (np.array(one[name], dtype=np.float64) for name in ("scores", "advantages"))
            self.epochs.append(Earlier(one["epoch"], weights, scores, advantages))


def _plain(values: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]
