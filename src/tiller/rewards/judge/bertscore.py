"""BERTScore (Zhang et al. 2020, arXiv 1904.09675, section 3) as plain functions of token embeddings.

Every token of one text is matched with the most similar token of the other:

    recall    = Σ_j w_j max_i cos(candidate_i, reference_j) / Σ_j w_j
    precision = Σ_i w_i max_j cos(candidate_i, reference_j) / Σ_i w_i
    f1        = 2 precision recall / (precision + recall)

The weights are 1 or, by choice, inverse document frequencies. As in the authors' package, the tokens that open and
close a text ([CLS], [SEP]) weigh nothing, but other tokens may match them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Match(NamedTuple):
    """How well a candidate text matches a reference; each is in [-1, 1] before rescaling, NaN where a text is empty."""

    precision: float
    recall: float
    f1: float


NO_MATCH = Match(math.nan, math.nan, math.nan)


def bertscore(candidate: Tensor, reference: Tensor, candidate_weights: Tensor, reference_weights: Tensor) -> Match:
    """Greedy matching of two texts' tokens by cosine similarity.

    Args:
        candidate: (K, D) embeddings of its tokens.
        reference: (L, D) embeddings of its tokens.
        candidate_weights: (K,) at least 0.
        reference_weights: (L,) at least 0.

    Precision is NaN where no token of the candidate weighs anything, recall where none of the reference does.
    """
    similarity = unit(candidate) @ unit(reference).T  # (K, L)
    precision = _mean(similarity.amax(1), candidate_weights)
    recall = _mean(similarity.amax(0), reference_weights)
    return Match(precision, recall, harmonic_mean(precision, recall))


def unit(vectors: Tensor) -> Tensor:
    """(K, D) float32 of length 1 each; a vector of zeros stays one."""
    return torch.nn.functional.normalize(vectors.float(), dim=-1)


def _mean(values: Tensor, weights: Tensor) -> float:
    return float((values * weights).sum() / weights.sum())  # 0 / 0 is NaN


def harmonic_mean(precision: float, recall: float) -> float:
    """F1; 0 where both are 0."""
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def rescaled(match: Match, baseline: Sequence[float]) -> Match:
    """(x - b) / (1 - b) of each part, so that unrelated texts score about 0 (section 5 of the paper).

    Args:
        baseline: mean precision, recall and F1 of unrelated texts under the same model and layer.
    """
    return Match(*((value - low) / (1 - low) for value, low in zip(match, baseline, strict=True)))


def inverse_document_frequency(documents: Iterable[Iterable[int]]) -> Callable[[int], float]:
    """log((M + 1) / (c + 1)), where c of M documents hold the token (section 3, with plus-one smoothing).

    Tokens that every document holds, such as [CLS], weigh 0.
    """
    seen = [set(document) for document in documents]
    count = Counter(token for document in seen for token in document)
    return lambda token: math.log((len(seen) + 1) / (count[token] + 1))
