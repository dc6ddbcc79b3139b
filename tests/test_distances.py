"""Distances between sets of pictures: closed forms, and formulas written out with numpy and scipy-free algebra."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tiller.evaluation.distances import frechet_distance, inception_score, kernel_distance, precision_recall
from tiller.types import ConfigError


def gaussian(count: int, width: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, width)) * scale + shift)


def root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return vectors @ np.diag(np.sqrt(np.clip(values, 0, None))) @ vectors.T


def test_frechet_distance_is_the_formula_with_a_symmetric_root() -> None:
    real, drawn = gaussian(200, 4, 0), gaussian(150, 4, 1, shift=0.3, scale=1.5)
    a, b = np.cov(real.T), np.cov(drawn.T)
    half = root(a)
    gap = (real.mean(0) - drawn.mean(0)).square().sum().item()
    wanted = gap + np.trace(a + b - 2 * root(half @ b @ half))
    assert frechet_distance(real, drawn) == pytest.approx(wanted, rel=1e-8)


def test_frechet_distance_of_a_shift_and_of_nothing() -> None:
    """A shift by v adds |v|²: covariances cancel."""
    real = gaussian(100, 3, 0)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(real, real + torch.tensor([3.0, 0.0, 4.0])) == pytest.approx(25, rel=1e-9)


def test_kernel_distance_of_whole_sets_is_the_unbiased_estimate() -> None:
    """With subsets as large as the sets there is one estimate, whatever the order."""
    real, drawn = gaussian(100, 5, 0).numpy(), gaussian(100, 5, 1, shift=0.5).numpy()

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / 5 + 1) ** 3

    n = 100
    inside = sum((kernel(x, x).sum() - np.trace(kernel(x, x))) / (n * (n - 1)) for x in (real, drawn))
    wanted = inside - 2 * kernel(real, drawn).mean()
    mean, deviation = kernel_distance(torch.from_numpy(real), torch.from_numpy(drawn))
    assert mean == pytest.approx(wanted, rel=1e-6)
    assert deviation == pytest.approx(0, abs=1e-6)


def test_kernel_distance_of_one_distribution_is_about_zero_and_the_same_for_the_same_seed() -> None:
    real, drawn = gaussian(400, 5, 0), gaussian(400, 5, 1)
    mean, deviation = kernel_distance(real, drawn, seed=3)
    assert abs(mean) < 2 * deviation
    assert kernel_distance(real, drawn, seed=3) == (mean, deviation)


def test_inception_score_is_the_number_of_classes_that_are_sure_and_even() -> None:
    sure = torch.eye(4).repeat(5, 1) * 1e3
    assert inception_score(sure) == pytest.approx(4, rel=1e-6)
    assert inception_score(torch.zeros(8, 4)) == pytest.approx(1, rel=1e-6)
    logits = gaussian(40, 4, 0)
    p = logits.softmax(1).numpy()
    wanted = np.exp((p * np.log(p / p.mean(0))).sum(1).mean())
    assert inception_score(logits) == pytest.approx(wanted, rel=1e-6)


def test_precision_and_recall_on_a_line_by_hand() -> None:
    """Real 0, 1, 2, 3 with one neighbour: balls of radius 1. Drawn 0.5, 9, 9.1: one of three lies inside.

    The balls about the drawn: 8.5, .1, .1, and 0 ... 3 all lie within 8.5 of 0.5.
    """
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    drawn = torch.tensor([[0.5], [9.0], [9.1]])
    assert precision_recall(real, drawn, neighbours=1) == (pytest.approx(1 / 3), 1.0)
    assert precision_recall(real, real + 100) == (0.0, 0.0)
    assert precision_recall(gaussian(50, 3, 0), gaussian(50, 3, 0)) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: frechet_distance(gaussian(8, 8, 0), gaussian(99, 8, 1)),
            "at least 9 reference pictures, and there are 8",
        ),
        (lambda: frechet_distance(gaussian(99, 8, 0), gaussian(3, 8, 1)), "at least 9 drawn pictures, and there are 3"),
        (lambda: kernel_distance(gaussian(99, 8, 0), gaussian(100, 8, 1)), "at least 100 reference pictures"),
        (lambda: inception_score(gaussian(3, 4, 0)), "at least 4 drawn pictures"),
        (lambda: precision_recall(gaussian(3, 4, 0), gaussian(9, 4, 1)), "at least 4 reference pictures"),
    ],
)
def test_too_few_pictures_are_refused_with_the_number_it_needs(call, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        call()
