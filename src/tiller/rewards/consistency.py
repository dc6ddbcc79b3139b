"""The consistency reward: prompts of one meaning should score alike, of another should not, whatever the wording.

With s the inner reward, p₀ the prompt and p_j its variants (paraphrases and changed ones), w_j in [0, 1] how alike the
wordings of p₀ and p_j are and d_j in [0, 1] how far apart their meanings are (both in `tiller.prompts.closeness`),

    v_j  = (1 - d_j) |s(x, p₀) - s(x, p_j)| + d_j max(0, κ - (s(x, p₀) - s(x, p_j)))
    r(x) = s(x, p₀) - λ Σ_j w_j v_j / Σ_j w_j

A variant of the same meaning (d = 0) costs what its score differs by; one of another meaning (d = 1) costs what its
score lacks to be κ below that of the prompt. Variants count the more, the closer their wording is: there a judge that
goes by the words goes wrong. λ = 0 is the inner reward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tiller.prompts.closeness import MEANING_MODEL, meaning, vectors, wording
from tiller.rewards.judge.encoder import TextEncoder
from tiller.rewards.variants import Variants, listed
from tiller.types import ConfigError, Prompt

MEANING = TextEncoder(MEANING_MODEL, layer=6)


def inconsistency(scores: Tensor, wordings: Tensor, meanings: Tensor, margin: float) -> Tensor:
    """() Σ_j w_j v_j / Σ_j w_j, at least 0; 0 where no variant has any word of the prompt.

    Args:
        scores: (1 + K,) of the prompt and its variants.
        wordings: (K,) w_j in [0, 1].
        meanings: (K,) d_j in [0, 1].
        margin: κ, in the unit of the scores.
    """
    ahead = scores[0] - scores[1:]  # (K,) how much better the prompt scores
    violation = (1 - meanings) * ahead.abs() + meanings * (margin - ahead).clamp(min=0)
    return (wordings * violation).sum() / wordings.sum().clamp(min=torch.finfo(scores.dtype).tiny)


@dataclass(frozen=True)
class Consistent(Variants):
    """The inner reward less λ times its inconsistency over the `contrast` and `paraphrases` in a prompt's metadata.

    A picture has no score where there are neither, or any of the inner scores is missing.
    """

    strength: float = 1.0  # λ
    margin: float = 0.01  # κ, in the unit of the inner score
    apart: float = 1.0  # the cosine distance of vectors from which on meanings have nothing in common
    text: TextEncoder = MEANING  # what tells meanings apart
    wanted = "contrast or paraphrases"

    def __post_init__(self) -> None:
        if self.strength < 0 or self.margin < 0 or self.apart <= 0:
            raise ConfigError("strength and margin cannot be negative, and apart must be more than 0.")

    def variants(self, metadata: Mapping[str, Any]) -> list[Prompt]:
        """The paraphrases, and the changed prompts."""
        return [*listed(metadata.get("paraphrases", ())), *listed(metadata.get("contrast", ()))]

    def combined(self, scores: Tensor, prompts: Sequence[str]) -> Tensor:
        """() the score."""
        wordings, meanings = (torch.tensor(row).to(scores) for row in _compared(self.text, self.apart, tuple(prompts)))
        return scores[0] - self.strength * inconsistency(scores, wordings, meanings, self.margin)


@lru_cache(maxsize=4096)
def _compared(encoder: TextEncoder, apart: float, prompts: tuple[str, ...]) -> tuple[list[float], list[float]]:
    """How alike in wording, and how far apart in meaning, the first prompt and each of the others are."""
    read = vectors(encoder, prompts)
    return [wording(prompts[0], other) for other in prompts[1:]], meaning(read[0], read[1:], apart).tolist()
