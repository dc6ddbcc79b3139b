"""AWM (Xue et al. 2025, "Advantage Weighted Matching: Aligning RL with Pretraining in Diffusion Models")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from torch import Tensor

from tiller import losses, matching
from tiller.advantages import History, group_relative
from tiller.algorithms.base import Algorithm, WeightCopy, require
from tiller.kernels import ODE, Kernel
from tiller.schedules import constant, ramp
from tiller.types import Scores

if TYPE_CHECKING:
    from tiller.policy.rollout import Step


@dataclass(frozen=True)
class AWM(Algorithm):
    """PPO with the weighted denoising error in the place of the log-probability."""

    weighting: matching.Weighting = "ghuber"
    power: float = 0.25  # of "ghuber"
    clip_range: float = 1.0  # 1 lets the ratio go up to 2
    ema_coefficient: float = 1.0  # of the mean square difference from a running mean's prediction
    ema_slope: float = 0.001  # its decay is min(slope·updates, most)
    ema_most: float = 0.3
    kl_coefficient: float = 0.003  # of the mean square difference from the reference's prediction
    advantage_clip: float = 5.0
    advantage_max: float = 1.0  # what a clipped advantage is scaled to
    advantage_scale: Literal["batch", "group", "none", "gdpo"] = "batch"
    train_timesteps: int = 6  # one from each of so many equal parts of the schedule
    first_timestep: int = 1  # 0 trains the step that starts from pure noise too
    timestep_fraction: float = 0.9  # the noisiest share of the schedule, that these parts divide
    off_policy: bool = False  # weigh by the ratio to the weights that drew the samples, at one forward pass more
    inner_epochs: int = 1
    kernel: Kernel | None = ODE()
    walk: ClassVar[Literal["recorded", "noised", "live"]] = "noised"
    min_group: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("power", "advantage_clip", "advantage_max"):
            require(getattr(self, name) > 0, name, getattr(self, name), "more than 0")
        for name in ("clip_range", "ema_coefficient", "kl_coefficient", "first_timestep"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        most = "at least 1" if self.off_policy else "1, or off_policy true"
        require(
            self.inner_epochs >= 1 and (self.off_policy or self.inner_epochs == 1),
            "inner_epochs",
            self.inner_epochs,
            most,
        )
        ramp(self.ema_slope, self.ema_most)

    @property
    def on_policy(self) -> bool:  # type: ignore[override]
        """Without the ratio to the weights that drew the samples, one update per epoch is all they are good for."""
        return not self.off_policy

    @property
    def needs(self) -> tuple[str, ...]:
        wanted = {"old": self.off_policy, "ema": self.ema_coefficient, "reference": self.kl_coefficient}
        return tuple(name for name, needed in wanted.items() if needed)

    @property
    def copies(self) -> Mapping[str, WeightCopy]:
        kinds = {"old": WeightCopy(constant(0), every="epoch"), "ema": WeightCopy(ramp(self.ema_slope, self.ema_most))}
        return {name: copy for name, copy in kinds.items() if name in self.needs}

    def steps(self, eligible: Sequence[int], random: np.random.Generator) -> list[int]:
        """One step from each of `train_timesteps` parts of equal length; fewer where the schedule has fewer steps."""
        last = len(eligible) - 1
        stop = min(max(int(self.timestep_fraction * len(eligible)), self.first_timestep + 1), last + 1)
        edges = np.linspace(self.first_timestep, stop, self.train_timesteps + 1).astype(int)
        places = edges[:-1] + (random.random(self.train_timesteps) * np.diff(edges)).astype(int)
        return [eligible[place] for place in np.unique(places.clip(0, last))]

    def advantages(self, scores: Scores, prompts: Sequence[str], history: History) -> np.ndarray:
        found = group_relative(scores, prompts, self.advantage_scale, self.advantage_clip)
        return found * (self.advantage_max / self.advantage_clip)

    def loss(self, step: Step, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        new = self._likelihood(step, None)
        old = self._likelihood(step, step.others["old"].prediction) if self.off_policy else new.detach()
        loss = losses.clipped_surrogate(new, old, advantages, self.clip_range)
        numbers = {"policy/denoising_error": step.distance().mean()}
        if self.off_policy:
            numbers["policy/clip_fraction"] = losses.clip_fraction(new, old, self.clip_range)
            numbers["policy/approx_kl"] = losses.approximate_kl(new, old)
        for name, coefficient in (("ema", self.ema_coefficient), ("reference", self.kl_coefficient)):
            if coefficient:
                kl = step.squared(step.prediction.float() - step.others[name].prediction.float())
                numbers["policy/ema_distance" if name == "ema" else "policy/kl_prediction"] = kl.mean()
                loss = loss + coefficient * kl
        return loss, numbers

    def _likelihood(self, step: Step, prediction: Tensor | None) -> Tensor:
        assert step.stage is not None
        alpha, sigma = step.stage.now
        return matching.log_likelihood(step.distance(prediction), sigma / (alpha + sigma), self.weighting, self.power)
