"""Supervised fine-tuning on the best of n (RAFT: Dong et al. 2023, arXiv 2304.06767; Flow-GRPO's baseline SFT)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from torch import Tensor

from tiller.advantages import History, best_of_group
from tiller.algorithms.base import Algorithm
from tiller.kernels import ODE, Kernel
from tiller.types import Scores

if TYPE_CHECKING:
    from tiller.policy.rollout import Step


@dataclass(frozen=True)
class SFT(Algorithm):
    """The denoising loss on the best picture of each prompt; a prompt whose pictures all score alike is left out."""

    inner_epochs: int = 1
    timestep_fraction: float = 1.0
    kernel: Kernel | None = ODE()
    walk: ClassVar[Literal["recorded", "noised", "live"]] = "noised"
    min_group: ClassVar[int] = 2

    def advantages(self, scores: Scores, prompts: Sequence[str], history: History) -> np.ndarray:
        return best_of_group(scores.values, prompts)

    def loss(self, step: Step, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        distance = step.distance()
        return advantages * distance, {"policy/denoising_error": distance.mean()}
