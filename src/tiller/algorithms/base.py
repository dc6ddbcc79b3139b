"""What the training loop asks of an algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor

from tiller.advantages import History
from tiller.kernels import Kernel
from tiller.types import ConfigError

if TYPE_CHECKING:
    from tiller.policy import Step


def require(holds: bool, name: str, value: object, rule: str) -> None:
    """A setting's rule; `ConfigError` where it is broken."""
    if not holds:
        raise ConfigError(f"{name} is {value}; it must be {rule}.")


def check_statistics(advantage_clip: float, buffer_size: int, min_count: int, timestep_fraction: float) -> None:
    """The rules of the settings that DDPO's two estimators share."""
    require(advantage_clip > 0, "advantage_clip", advantage_clip, "more than 0")
    require(buffer_size >= 1, "buffer_size", buffer_size, "at least 1")
    require(min_count <= buffer_size, "min_count", min_count, f"no more than buffer_size ({buffer_size})")
    require(0 < timestep_fraction <= 1, "timestep_fraction", timestep_fraction, "more than 0 and at most 1")


class Algorithm(Protocol):
    """A frozen dataclass of an algorithm's own settings; their defaults are a run that was made."""

    @property
    def kernel(self) -> Kernel | None:
        """How transitions are drawn; None leaves it to the policy (`Policy.sample`)."""
        ...

    @property
    def inner_epochs(self) -> int:
        """How often an epoch's samples are gone through."""
        ...

    @property
    def timestep_fraction(self) -> float:
        """The share of a rollout's trainable steps that is trained, drawn anew for every update."""
        ...

    def advantages(self, rewards: np.ndarray, prompts: Sequence[str], history: History) -> np.ndarray:
        """(N,) advantages of an epoch's (N,) rewards; NaN where a reward is missing."""
        ...

    def loss(self, step: Step, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(B,) losses of one replayed step, and numbers for the log."""
        ...
