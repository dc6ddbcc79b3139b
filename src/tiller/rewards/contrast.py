"""The contrast reward: is the picture one of its prompt rather than of a prompt with one word changed?

With s(x, p) the inner reward, p₀ the prompt and p₁ ... p_K the changed ones in its metadata,

    r(x) = exp(s(x, p₀) / τ) / Σ_j exp(s(x, p_j) / τ)

This is the probability of p₀ under a softmax over the prompts, as CLIP classifies pictures (Radford et al. 2021, arXiv
2103.00020, section 3.1). What a picture gains with every prompt alike, such as beauty or a large plain background,
cancels out; what tells the words apart remains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiller.rewards.variants import Variants, listed
from tiller.types import ConfigError, Prompt


def contrast(scores: Tensor, temperature: float) -> Tensor:
    """(...) the log-probability, in nats, of the first of the scores (..., 1 + K) under a softmax over all."""
    return (scores / temperature).log_softmax(-1)[..., 0]


@dataclass(frozen=True)
class Contrast(Variants):
    """The probability of the prompt among its `contrast`ing ones, in [0, 1]; or its logarithm, at most 0.

    A picture has no score where its prompt has no `contrast` in its metadata, or any of the inner scores is missing.
    """

    temperature: float = 0.01  # of the inner score's unit: about what it differs by between prompts
    log: bool = False  # the log-probability: it does not flatten out where the prompt has lost or won
    wanted = "contrast"

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ConfigError(f"temperature is {self.temperature}; it must be more than 0.")

    def variants(self, metadata: Mapping[str, Any]) -> list[Prompt]:
        """The changed prompts."""
        return listed(metadata.get("contrast", ()))

    def combined(self, scores: Tensor, prompts: Sequence[str]) -> Tensor:
        """() the score."""
        value = contrast(scores, self.temperature)
        return value if self.log else torch.exp(value)
