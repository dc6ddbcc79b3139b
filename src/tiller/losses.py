"""Policy losses: tensors and numbers in, one loss per sample out. All are to be minimised."""

from __future__ import annotations

import torch
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


def clamped_ratio(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """-A·clip(ρ, 1-c, 1+c), shape (B,) (Fan et al. 2023, DPOK, reference code).

    Unlike PPO's maximum it has no gradient at all outside the range, not even for a move that would lead back.
    """
    _same_shape(log_prob, advantages)
    return -advantages * (log_prob - old_log_prob).exp().clamp(1 - clip_range, 1 + clip_range)


def guarded_log_ratio(log_prob: Tensor, old_log_prob: Tensor, mean_shift: Tensor, std: float | Tensor) -> Tensor:
    """GRPO-Guard's log-ratio, shape (B,): (log ρ)·S + |Δμ|²/(2S) (Wang et al. 2025, GRPO-Guard, eq. 9).

    It is the mean of z·Δμ over elements: its expectation under the old policy is 0 at every step, where that of log ρ
    is negative, so that a symmetric clip range is symmetric indeed. `mean_shift` is the mean over elements of Δμ².
    """
    _same_shape(log_prob, mean_shift)
    return (log_prob - old_log_prob) * std + mean_shift / (2 * std)


def divergence_masked(ratio: Tensor, advantages: Tensor, divergence: Tensor, limit: float) -> Tensor:
    """-A·ρ, and 0 where KL(old, new) has reached the limit and the move would lead further away (Flow-DPPO), (B,)."""
    _same_shape(ratio, advantages)
    further = ((ratio > 1) & (advantages > 0)) | ((ratio < 1) & (advantages < 0))
    return torch.where((divergence >= limit) & further, torch.zeros_like(ratio), -advantages * ratio)


def gaussian_kl(mean_shift: Tensor, std: float | Tensor) -> Tensor:
    """KL(N(μ, S²), N(μ', S²)) per element: mean |Δμ|²/(2S²), shape (B,), from the mean of Δμ² over elements."""
    return mean_shift / (2 * torch.as_tensor(std) ** 2)
