"""Diffusion-DPO (Wallace et al. 2023, "Diffusion Model Alignment Using Direct Preference Optimization")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from torch import Tensor

from tiller import matching
from tiller.advantages import History
from tiller.algorithms.base import Algorithm, require
from tiller.algorithms.pairs import preferences
from tiller.kernels import ODE, Kernel
from tiller.types import Scores

if TYPE_CHECKING:
    from tiller.policy.rollout import Step


@dataclass(frozen=True)
class DiffusionDPO(Algorithm):
    """The best picture of each group against its worst. The loss asks only for groups and an order within them.

    The groups are a prompt's samples in the order of their rewards; or, with preference pairs as data, these pairs.
    """

    beta: float = 100.0
    inner_epochs: int = 1
    timestep_fraction: float = 1.0
    kernel: Kernel | None = ODE()
    walk: ClassVar[Literal["recorded", "noised", "live"]] = "noised"
    min_group: ClassVar[int] = 2
    whole_groups: ClassVar[bool] = True
    shared_noise: ClassVar[bool] = True
    takes_pairs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta > 0, "beta", self.beta, "more than 0")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("reference",)

    def advantages(self, scores: Scores, prompts: Sequence[str], history: History) -> np.ndarray:
        return preferences(scores.values, prompts)

    def loss(self, step: Step, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert step.groups is not None
        best, worst = matching.best_and_worst(advantages, step.groups)
        distance = step.distance()
        risen = distance - step.distance(step.others["reference"].prediction)  # (B,) d - d_ref
        return matching.diffusion_dpo(risen[best], risen[worst], self.beta), {
            "policy/preference_accuracy": (risen[best] < risen[worst]).float().mean(),
            "policy/margin": (risen[worst] - risen[best]).mean(),
            "policy/winner_error": distance[best].mean(),
            "policy/loser_error": distance[worst].mean(),
        }
