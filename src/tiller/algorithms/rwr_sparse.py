"""Sparse reward-weighted regression (Black et al. 2023, DDPO, section 4.2 and appendix): the best tenth, weight 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from torch import Tensor

from tiller.advantages import History, top_share
from tiller.algorithms.base import Algorithm, require
from tiller.kernels import ODE, Kernel
from tiller.types import Scores

if TYPE_CHECKING:
    from tiller.policy.rollout import Step


@dataclass(frozen=True)
class RWRSparse(Algorithm):
    """The denoising loss on the pictures that are among the best `share` of their prompt's latest ones."""

    share: float = 0.1
    buffer_size: int = 64  # latest rewards kept per prompt
    inner_epochs: int = 5
    timestep_fraction: float = 1.0
    kernel: Kernel | None = ODE()
    walk: ClassVar[Literal["recorded", "noised", "live"]] = "noised"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.share <= 1, "share", self.share, "in (0, 1]")

    def advantages(self, scores: Scores, prompts: Sequence[str], history: History) -> np.ndarray:
        return top_share(scores.values, prompts, history, self.share, self.buffer_size)

    def loss(self, step: Step, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        distance = step.distance()
        return advantages * distance, {"policy/denoising_error": distance.mean()}
