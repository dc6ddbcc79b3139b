"""What the group-relative methods share: their loss on one step. They differ in kernel, window, scale and settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from tiller import losses
from tiller.algorithms.kl import Estimator, divergence

if TYPE_CHECKING:
    from tiller.policy.rollout import Step

TrustRegion = Literal["clip", "guard", "dppo"]


@dataclass(frozen=True)
class GroupLoss:
    """PPO on one denoising step, with the trust region of choice, and a KL penalty to the model before training.

    "clip" is PPO's; "guard" clips GRPO-Guard's centred log-ratio; "dppo" drops moves that go on beyond a KL of
    `clip_range` to the old policy (Flow-DPPO). The last two need the means of the recorded transitions.
    """

    clip_range: float
    trust_region: TrustRegion = "clip"
    kl_coefficient: float = 0.0
    kl_estimator: Estimator = "gaussian"

    def __call__(self, step: Step, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert step.old_log_prob is not None
        new, old = step.log_prob, step.old_log_prob
        numbers = {"policy/approx_kl": losses.approximate_kl(new, old)}
        if self.trust_region == "dppo":
            moved = losses.gaussian_kl(_shift(step), step.std)
            loss = losses.divergence_masked((new - old).exp(), advantages, moved, self.clip_range)
            numbers["policy/dropped_fraction"] = (loss == 0).float().mean()
        else:
            if self.trust_region == "guard":
                new, old = losses.guarded_log_ratio(new, old, _shift(step), step.std), old * 0
            loss = losses.clipped_surrogate(new, old, advantages, self.clip_range)
            numbers["policy/clip_fraction"] = losses.clip_fraction(new, old, self.clip_range)
        if self.kl_coefficient:
            kl = divergence(step, self.kl_estimator)
            numbers[f"policy/kl_{self.kl_estimator}"] = kl.mean()
            loss = loss + self.kl_coefficient * kl
        return loss, numbers


def _shift(step: Step) -> Tensor:
    """(B,) mean over elements of (μ - μ_old)²."""
    assert step.old_mean is not None
    return step.squared(step.mean - step.old_mean)
