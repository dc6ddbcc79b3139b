"""What a learned reward is fitted by: functions of scores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry(first: Tensor, second: Tensor, preferred: Tensor) -> Tensor:
    """(N,) -log likelihoods of N comparisons, p(first is better) = σ(r_1 - r_2) (Bradley & Terry 1952).

    Args:
        first, second: (N,) scores.
        preferred: (N,) 1 where the first was preferred, 0 where the second was, a half for a tie
            (Christiano et al. 2017, 1706.03741, section 2.2.3).
    """
    return F.binary_cross_entropy_with_logits(first - second, preferred, reduction="none")


def squared_error(scores: Tensor, labels: Tensor) -> Tensor:
    """(N,) (y - r)² (Lee et al. 2023, 2302.12192, eq. 1)."""
    return (labels - scores).square()


def prompt_classification(scores: Tensor, labels: Tensor, temperature: float = 2.0) -> Tensor:
    """(N,) y · -log softmax_j(r(x, z_j)/T) of the true prompt, among changed ones (Lee et al. 2023, eq. 2).

    Args:
        scores: (N, M) of each picture with M prompts, the true one first. With M = 1 it is 0.
        labels: (N,) in [0, 1]; the term counts as much as the label says that the picture fits.
    """
    return -labels * torch.log_softmax(scores / temperature, dim=1)[:, 0]
