"""Policy losses: tensors and numbers in, one loss per sample out. All are to be minimised."""

from __future__ import annotations

from torch import Tensor


def score_function(log_prob: Tensor, advantages: Tensor) -> Tensor:
    """REINFORCE: -A·log π_θ(a|s), shape (B,) (Black et al. 2023, DDPO, section 4.3, DDPO_SF).

    Unbiased only for actions drawn from π_θ itself: one update per rollout.
    """
    _same_shape(log_prob, advantages)
    return -advantages * log_prob


def clipped_surrogate(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """PPO's pessimistic surrogate, shape (B,) (Schulman et al. 2017, eq. 7; Black et al. 2023, DDPO_IS).

    max(-A·ρ, -A·clip(ρ, 1-c, 1+c)) with ρ = π_θ(a|s) / π_old(a|s), one ratio per sample and denoising step.
    """
    _same_shape(log_prob, advantages)
    _same_shape(log_prob, old_log_prob)
    ratio = (log_prob - old_log_prob).exp()  # (B,) π_θ / π_old of x_{t-1} given x_t
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return (-advantages * ratio).maximum(-advantages * clipped)


def clip_fraction(log_prob: Tensor, old_log_prob: Tensor, clip_range: float) -> Tensor:
    """The share of samples whose ratio lies outside the clip range; a number in [0, 1]."""
    ratio = (log_prob - old_log_prob).exp()
    return ((ratio - 1).abs() > clip_range).float().mean()


def approximate_kl(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """½·E[(log π_θ - log π_old)²], a second-order estimate of KL(π_old, π_θ) (Schulman 2020, k2)."""
    return 0.5 * (log_prob - old_log_prob).square().mean()


def _same_shape(log_prob: Tensor, other: Tensor) -> None:
    if log_prob.shape != other.shape:
        raise ValueError(f"shapes differ: log_prob is {tuple(log_prob.shape)}, the other {tuple(other.shape)}")
