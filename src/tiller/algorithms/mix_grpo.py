"""MixGRPO (Li et al. 2025, "MixGRPO: Unlocking Flow-based GRPO Efficiency with Mixed ODE-SDE", arXiv 2507.21802)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from torch import Tensor

from tiller.advantages import History, group_relative
from tiller.algorithms.base import Algorithm
from tiller.algorithms.grpo import GroupLoss, TrustRegion
from tiller.kernels import Kernel
from tiller.schedules import moving_window
from tiller.types import Scores

if TYPE_CHECKING:
    from tiller.policy.rollout import Step


@dataclass(frozen=True)
class MixGRPO(Algorithm):
    """GRPO in a window of noisy steps that moves from the noise towards the picture; the ODE elsewhere."""

    window_size: int = 4
    window_every: int = 25  # epochs until the window moves on
    window_stride: int = 1  # steps by which it moves; at the end it begins anew
    clip_range: float = 1e-4
    advantage_clip: float = 5.0
    advantage_scale: Literal["batch", "group", "none", "gdpo"] = "group"
    trust_region: TrustRegion = "clip"
    inner_epochs: int = 1
    kernel: Kernel | None = None
    min_group: ClassVar[int] = 2

    @property
    def keeps_means(self) -> bool:
        return self.trust_region != "clip"

    @property
    def _loss(self) -> GroupLoss:
        return GroupLoss(self.clip_range, self.trust_region)

    def window(self, epoch: int, steps: int, seed: int) -> range:
        return moving_window(self.window_size, steps, epoch, self.window_every, self.window_stride)

    def advantages(self, scores: Scores, prompts: Sequence[str], history: History) -> np.ndarray:
        return group_relative(scores, prompts, self.advantage_scale, self.advantage_clip)

    def loss(self, step: Step, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self._loss(step, advantages)
