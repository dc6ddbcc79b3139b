"""Flow-GRPO (Liu et al. 2025, "Flow-GRPO: Training Flow Matching Models via Online RL", arXiv 2505.05470)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from torch import Tensor

from tiller.advantages import History, group_relative
from tiller.algorithms.base import Algorithm
from tiller.algorithms.grpo import GroupLoss, TrustRegion
from tiller.algorithms.kl import Estimator
from tiller.kernels import Kernel
from tiller.types import Scores

if TYPE_CHECKING:
    from tiller.policy.rollout import Step


@dataclass(frozen=True)
class FlowGRPO(Algorithm):
    """GRPO on the SDE that has the flow's marginals, with a KL to the model before training.

    Works on ε and v models as well, whose kernel is then DDIM(1) unless another one is given.
    """

    clip_range: float = 1e-4
    advantage_clip: float = 5.0
    advantage_scale: Literal["batch", "group", "none", "gdpo"] = "batch"
    kl_coefficient: float = 0.04
    kl_estimator: Estimator = "flow_grpo"
    trust_region: TrustRegion = "clip"
    train_last_step: bool = False  # its standard deviation is the smallest, so its ratio the noisiest
    inner_epochs: int = 1
    timestep_fraction: float = 1.0
    kernel: Kernel | None = None
    min_group: ClassVar[int] = 2

    @property
    def needs(self) -> tuple[str, ...]:
        return ("reference",) if self.kl_coefficient else ()

    @property
    def keeps_means(self) -> bool:
        return self.trust_region != "clip"

    @property
    def _loss(self) -> GroupLoss:
        return GroupLoss(self.clip_range, self.trust_region, self.kl_coefficient, self.kl_estimator)

    def steps(self, eligible: Sequence[int], random: np.random.Generator) -> list[int]:
        kept = eligible if self.train_last_step or len(eligible) == 1 else eligible[:-1]
        return super().steps(kept, random)

    def advantages(self, scores: Scores, prompts: Sequence[str], history: History) -> np.ndarray:
        return group_relative(scores, prompts, self.advantage_scale, self.advantage_clip)

    def loss(self, step: Step, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self._loss(step, advantages)
