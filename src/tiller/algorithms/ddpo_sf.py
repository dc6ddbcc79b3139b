"""DDPO with the score function estimator (Black et al. 2023, "Training Diffusion Models with RL", section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from torch import Tensor

from tiller import losses
from tiller.advantages import History, per_prompt
from tiller.algorithms.base import Algorithm, require
from tiller.kernels import Kernel
from tiller.types import Scores

if TYPE_CHECKING:
    from tiller.policy import Step


@dataclass(frozen=True)
class DDPOSF(Algorithm):
    """DDPO_SF: REINFORCE on the denoising steps; each sample is used once, with one optimiser step per epoch."""

    advantage_clip: float = 5.0
    buffer_size: int = 32  # latest rewards kept per prompt
    min_count: int = 16  # rewards a prompt needs before its own statistics count
    timestep_fraction: float = 1.0
    kernel: Kernel | None = None
    on_policy: ClassVar[bool] = True  # the estimator is unbiased on the policy's own samples only

    def __post_init__(self) -> None:
        super().__post_init__()
        most = f"no more than buffer_size ({self.buffer_size})"
        require(self.min_count <= self.buffer_size, "min_count", self.min_count, most)

    def advantages(self, scores: Scores, prompts: Sequence[str], history: History) -> np.ndarray:
        standardised = per_prompt(scores.values, prompts, history, self.buffer_size, self.min_count)
        return standardised.clip(-self.advantage_clip, self.advantage_clip)

    def loss(self, step: Step, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return losses.score_function(step.log_prob, advantages), {}
