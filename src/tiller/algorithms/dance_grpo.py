"""DanceGRPO (Xue et al. 2025, "DanceGRPO: Unleashing GRPO on Visual Generation", arXiv 2505.07818)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from torch import Tensor

from tiller.advantages import History, group_relative
from tiller.algorithms.base import Algorithm
from tiller.algorithms.grpo import GroupLoss, TrustRegion
from tiller.kernels import DanceSDE, Kernel
from tiller.types import Scores

if TYPE_CHECKING:
    from tiller.policy.rollout import Step


@dataclass(frozen=True)
class DanceGRPO(Algorithm):
    """GRPO with constant diffusion, one initial noise per group, a random part of the steps, and no KL."""

    clip_range: float = 1e-4
    advantage_clip: float = 5.0
    advantage_scale: Literal["batch", "group", "none", "gdpo"] = "group"
    trust_region: TrustRegion = "clip"
    inner_epochs: int = 1
    timestep_fraction: float = 0.6
    kernel: Kernel | None = DanceSDE(0.3)
    min_group: ClassVar[int] = 2
    shared_start: ClassVar[bool] = True

    @property
    def keeps_means(self) -> bool:
        return self.trust_region != "clip"

    @property
    def _loss(self) -> GroupLoss:
        return GroupLoss(self.clip_range, self.trust_region)

    def steps(self, eligible: Sequence[int], random: np.random.Generator) -> list[int]:
        return super().steps(eligible[:-1] or eligible, random)  # the last transition is not trained

    def advantages(self, scores: Scores, prompts: Sequence[str], history: History) -> np.ndarray:
        return group_relative(scores, prompts, self.advantage_scale, self.advantage_clip)

    def loss(self, step: Step, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self._loss(step, advantages)
