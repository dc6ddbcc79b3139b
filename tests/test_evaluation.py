"""Paired comparison: hand-worked numbers, and what the interval must do."""

import numpy as np
import pytest

from tiller.evaluation import Evaluated, compare


def test_means_difference_and_win_rate_are_those_worked_by_hand():
    found = compare(np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 2.0, 2.0, 8.0]), ["a", "b", "c", "d"])
    assert (found.base, found.tuned, found.difference) == (2.5, 3.5, 1.0)
    assert found.win_rate == (1 + 0.5 + 0 + 1) / 4


def test_a_pair_with_a_missing_score_is_left_out_of_everything():
    whole = compare(np.array([1.0, 2.0]), np.array([2.0, 4.0]), ["a", "b"])
    holed = compare(np.array([1.0, np.nan, 2.0, 7.0]), np.array([2.0, 5.0, 4.0, np.nan]), ["a", "x", "b", "y"])
    assert whole == holed


def test_the_same_gain_everywhere_leaves_no_doubt():
    base = np.random.default_rng(0).normal(size=40)
    found = compare(base, base + 0.5, [str(index) for index in range(40)])
    assert found.low == pytest.approx(0.5)
    assert found.high == pytest.approx(0.5)
    assert found.certain


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        gains = random.normal(0.3, 1.0, size=60)
        found = compare(np.zeros(60), gains, [str(index) for index in range(60)], seed=trial)
        covered += found.low <= 0.3 <= found.high
    assert 0.89 <= covered / 200 <= 0.99  # 95 % less three standard errors of 200 trials, on either side


def test_pictures_of_one_prompt_are_not_counted_as_independent():
    random = np.random.default_rng(2)
    per_prompt = random.normal(size=20)
    gains = np.repeat(per_prompt, 8)
    prompts = [str(index) for index in range(20) for _ in range(8)]
    clustered = compare(np.zeros(160), gains, prompts)
    once = compare(np.zeros(20), per_prompt, [str(index) for index in range(20)])
    assert clustered.high - clustered.low == pytest.approx(once.high - once.low, rel=0.05)


def test_nothing_to_compare_is_an_error():
    with pytest.raises(ValueError, match="no picture was scored for both"):
        compare(np.array([np.nan]), np.array([1.0]), ["a"])
    with pytest.raises(ValueError, match="2 base scores, 1 tuned"):
        compare(np.zeros(2), np.zeros(1), ["a", "b"])


def test_scores_survive_plain_data_with_the_missing_ones_as_null():
    before = Evaluated(("a", "b"), {"r": np.array([1.5, np.nan])})
    data = before.to_data()
    assert data["scores"]["r"] == [1.5, None]
    after = Evaluated.from_data(data)
    assert after.prompts == before.prompts
    np.testing.assert_array_equal(after.scores["r"], before.scores["r"])
