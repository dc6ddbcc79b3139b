"""Distances between two sets of pictures, on features that somebody else extracted: functions of matrices.

The Fréchet distance, the kernel distance and the Inception score are torchmetrics' own. What they are called depends on
the features: FID and KID mean those of one Inception network; on others the numbers are of another scale.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from tiller.types import ConfigError

NEIGHBOURS = 3  # k of Kynkäänniemi et al. 2019
SUBSET = 100  # pictures of one estimate of the kernel distance
SUBSETS = 100


class Given(nn.Module):
    """Hands features through, in the place of a network that would extract them."""

    def __init__(self, width: int):
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(real: Tensor, drawn: Tensor) -> float:
    """|μ - μ'|² + tr(Σ + Σ' - 2 (Σ Σ')^½) of features (N, D) and (M, D) (Heusel et al. 2017, 1706.08500, eq. 6).

    Raises:
        ConfigError: a set has no more pictures than features, so that its covariance is singular and the distance far
            too large.
    """
    for name, features in (("reference", real), ("drawn", drawn)):
        enough(name, len(features), features.shape[1] + 1, "a Fréchet distance on features of this width")
    metric = FrechetInceptionDistance(feature=Given(real.shape[1])).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(drawn.double(), real=False)
    return float(metric.compute())


def kernel_distance(real: Tensor, drawn: Tensor, seed: int = 0) -> tuple[float, float]:
    """Squared maximum mean discrepancy with the kernel (x·y/D + 1)³ (Bińkowski et al. 2018, 1801.01401, section 4).

    Returns the mean over 100 random subsets of 100 pictures, and their standard deviation. It is unbiased, so that it
    may be negative, and that sets of different sizes can be compared.

    Raises:
        ConfigError: a set has fewer than 100 pictures.
    """
    for name, features in (("reference", real), ("drawn", drawn)):
        enough(name, len(features), SUBSET, "a kernel distance")
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(feature=Given(real.shape[1]), subsets=SUBSETS, subset_size=SUBSET)
        metric.update(real.double(), real=True)
        metric.update(drawn.double(), real=False)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def inception_score(logits: Tensor) -> float:
    """exp E KL(p(y|x) ‖ p(y)) of a classifier's logits (N, classes) (Salimans et al. 2016, 1606.03498), in one split.

    Raises:
        ConfigError: there are fewer pictures than classes, which bounds the score from above.
    """
    enough("drawn", len(logits), logits.shape[1], "an Inception score with that many classes")
    with _quiet():
        metric = InceptionScore(feature=Given(logits.shape[1]), splits=1)
        metric.update(logits.double())
        return float(metric.compute()[0])


def precision_recall(real: Tensor, drawn: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Share of drawn pictures within the manifold of the real ones, and the reverse.

    A set's manifold is the union of balls about its members, each as wide as the distance to the k-th neighbour
    (Kynkäänniemi et al. 2019, 1904.06991, section 2).

    Raises:
        ConfigError: a set has no k neighbours.
    """
    for name, features in (("reference", real), ("drawn", drawn)):
        enough(name, len(features), neighbours + 1, f"precision and recall with {neighbours} neighbours")
    return _within(drawn, real, neighbours), _within(real, drawn, neighbours)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torchmetrics' warnings that it keeps all features, and that one split has no deviation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _within(points: Tensor, centres: Tensor, neighbours: int) -> float:
    """The share of points that lie in a ball about one of the centres."""
    own = torch.cdist(centres.double(), centres.double()).sort(dim=1).values[:, neighbours]  # column 0 is itself
    return float((torch.cdist(points.double(), centres.double()) <= own).any(1).double().mean())


def enough(name: str, given: int, wanted: int, what: str) -> None:
    """Refuse too few pictures.

    Raises:
        ConfigError: there are fewer than wanted.
    """
    if given < wanted:
        raise ConfigError(f"{what} needs at least {wanted} {name} pictures, and there are {given}; give more.")
