"""Advantages: golden numbers, invariances, and missing scores that touch nobody."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import pytest

from tiller.advantages import History, global_, group, per_prompt, zero_spread_groups

NAN = float("nan")
SCORES = np.array([1.0, 2.0, 4.0, 0.0, 0.0, 0.0])
GROUPS = [0, 0, 0, 1, 1, 1]


def random(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(3.0, 2.0, count)


# ---- golden numbers ----


def test_group_with_unbiased_std_golden() -> None:
    found = group(SCORES, GROUPS)
    np.testing.assert_allclose(found, [-0.87287156, -0.21821789, 1.09108944, 0, 0, 0], rtol=0, atol=1e-7)


def test_group_mean_with_the_std_of_the_batch_golden() -> None:
    found = group(SCORES, GROUPS, scale="batch")
    np.testing.assert_allclose(found, [-0.91162228, -0.22790557, 1.13952785, 0, 0, 0], rtol=0, atol=1e-7)


def test_group_without_scale_is_the_difference_from_the_mean() -> None:
    np.testing.assert_allclose(group(SCORES, GROUPS, scale="none"), [-4 / 3, -1 / 3, 5 / 3, 0, 0, 0], atol=1e-12)


def test_global_golden() -> None:
    np.testing.assert_allclose(global_(np.array([1.0, 3.0])), [-1, 1], rtol=0, atol=1e-7)


def test_an_unknown_scale_is_refused() -> None:
    with pytest.raises(KeyError):
        group(SCORES, GROUPS, scale="globl")


# ---- T17 ----


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages_sum_to_zero_in_every_group(scale: str) -> None:
    found = group(random(24), np.repeat(np.arange(4), 6).tolist(), scale)
    np.testing.assert_allclose(found.reshape(4, 6).sum(1), 0, atol=1e-10)


def test_global_advantages_have_mean_zero_and_std_one() -> None:
    found = global_(random(50))
    assert found.mean() == pytest.approx(0, abs=1e-10)
    assert found.std() == pytest.approx(1, abs=1e-7)


def ways(values: np.ndarray) -> dict[str, np.ndarray]:
    groups = [index % 3 for index in range(len(values))]
    prompts = [str(g) for g in groups]
    return {
        "global": global_(values),
        "group": group(values, groups),
        "batch": group(values, groups, "batch"),
        "own statistics": per_prompt(values, prompts, {}, min_count=2),
        "fallback": per_prompt(values, prompts, {}, min_count=99),
    }


def test_scale_and_offset_of_the_reward_do_not_matter() -> None:
    plain, affine = ways(random(12)), ways(1000 * random(12) - 77)
    for name, expected in plain.items():
        np.testing.assert_allclose(affine[name], expected, rtol=2e-4, err_msg=name)  # the ε of the divisions


def test_groups_need_not_lie_side_by_side() -> None:
    values, order = random(12), np.random.default_rng(1).permutation(12)
    labels = np.repeat([5, 2, 9], 4)
    together = group(values, labels.tolist())
    np.testing.assert_allclose(group(values[order], labels[order].tolist()), together[order], rtol=1e-12)


def test_a_group_without_spread_has_advantage_zero_however_the_mean_rounds() -> None:
    values = np.array([0.1, 0.1, 0.1, 5.0, 6.0, 7.0])
    assert group(values, GROUPS)[:3].tolist() == [0, 0, 0]
    assert zero_spread_groups(values, GROUPS) == 1


def test_groups_with_fewer_than_two_scores_count_as_without_spread() -> None:
    values = np.array([1.0, NAN, NAN, NAN, NAN, NAN, 1.0, 1.0, NAN, 1.0, 2.0, NAN])
    groups = np.repeat(np.arange(4), 3).tolist()
    assert zero_spread_groups(values, groups) == 3
    found = group(values, groups)
    assert found[0] == 0
    assert np.isnan(found[[1, 2, 3, 4, 5, 8, 11]]).all()


# ---- missing scores ----


@pytest.mark.parametrize("missing", [NAN, float("inf"), -float("inf")])
def test_a_missing_score_stays_missing_and_touches_no_other_advantage(missing: float) -> None:
    """Equal, number by number, to the batch in which the picture never was; and never 0."""
    values, gone = random(12), np.array([3, 7])
    with_gaps = values.copy()
    with_gaps[gone] = missing
    kept = np.setdiff1d(np.arange(12), gone)
    groups = [index % 3 for index in range(12)]
    prompts = [str(g) for g in groups]

    def all_ways(scores: np.ndarray, rows: Any) -> dict[str, np.ndarray]:
        labels, texts = [groups[i] for i in rows], [prompts[i] for i in rows]
        return {
            "global": global_(scores),
            "group": group(scores, labels),
            "batch": group(scores, labels, "batch"),
            "own statistics": per_prompt(scores, texts, {}, min_count=2),
            "fallback": per_prompt(scores, texts, {}, min_count=99),
        }

    absent = all_ways(values[kept], kept)
    for name, found in all_ways(with_gaps, range(12)).items():
        assert not np.isfinite(found[gone]).any(), name
        np.testing.assert_array_equal(found[kept], absent[name], err_msg=name)


def test_missing_scores_enter_no_history() -> None:
    history: History = {}
    per_prompt(np.array([1.0, NAN, float("inf")]), ["a", "a", "b"], history)
    assert history == {"a": [1.0]}


def test_all_scores_missing_is_all_advantages_missing() -> None:
    values = np.full(4, NAN)
    for found in (global_(values), group(values, [0, 0, 1, 1]), per_prompt(values, ["a"] * 4, {})):
        assert np.isnan(found).all()


# ---- the per-prompt tracker ----


def test_too_few_rewards_of_a_prompt_fall_back_to_the_statistics_of_the_batch() -> None:
    values = np.array([1.0, 2.0, 3.0, 10.0])
    found = per_prompt(values, ["a", "a", "a", "b"], {}, min_count=3)
    own = (values[:3] - 2.0) / (np.std([1, 2, 3]) + 1e-6)
    batch = (10.0 - values.mean()) / (values.std() + 1e-6)
    np.testing.assert_allclose(found, [*own, batch], rtol=1e-12)


def test_statistics_run_over_the_epochs_and_forget_beyond_the_buffer() -> None:
    history: History = {}
    per_prompt(np.array([1.0, 2.0, 3.0]), ["a"] * 3, history, buffer_size=4, min_count=4)
    found = per_prompt(np.array([4.0, 5.0]), ["a"] * 2, history, buffer_size=4, min_count=4)
    assert history == {"a": [2.0, 3.0, 4.0, 5.0]}  # the oldest is forgotten, those just drawn count
    np.testing.assert_allclose(found, (np.array([4.0, 5.0]) - 3.5) / (np.std([2, 3, 4, 5]) + 1e-6), rtol=1e-12)


def test_the_tracker_agrees_with_an_independent_one() -> None:
    """Written from the reference implementation's description: a deque per prompt, filled before it is read."""
    source = np.random.default_rng(0)
    buffers: dict[str, deque[float]] = {}
    history: History = {}
    for _ in range(6):
        prompts = [str(p) for p in source.integers(0, 3, 10)]
        rewards = source.normal(size=10)
        expected = np.empty(10)
        for prompt in set(prompts):
            rows = [i for i, p in enumerate(prompts) if p == prompt]
            buffer = buffers.setdefault(prompt, deque(maxlen=8))
            buffer.extend(rewards[rows])
            known = rewards if len(buffer) < 5 else np.array(buffer)
            expected[rows] = (rewards[rows] - known.mean()) / (known.std() + 1e-6)
        found = per_prompt(rewards, prompts, history, buffer_size=8, min_count=5)
        np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_prompts_and_scores_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        per_prompt(np.zeros(3), ["a", "b"], {})
