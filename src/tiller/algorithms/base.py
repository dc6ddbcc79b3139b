"""What the training loop asks of an algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor

from tiller.advantages import History
from tiller.kernels import Kernel

if TYPE_CHECKING:
    from tiller.policy import Step


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
