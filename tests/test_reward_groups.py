"""Groupwise and pairwise rewards: who is asked about what, win rates against hand computation, what is missing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tiller.rewards import Background, score, within
from tiller.rewards.check import check_gradient, check_groups
from tiller.rewards.groups import ALONE, pairs, win_rates
from tiller.rewards.mix import Mix, Part
from tiller.types import ConfigError, RewardError, Score

STRENGTHS = [0, 10, 30, 60]
IMAGES = [Image.new("L", (4, 4), value) for value in STRENGTHS]
PROMPTS, METADATA = ["a cat"] * 4, [{}] * 4


def strength(image: Any) -> float:
    return image.getpixel((0, 0)) / 20


def bradley_terry(first: list, second: list, prompts: list, metadata: list) -> list[float]:
    return [1 / (1 + math.exp(strength(b) - strength(a))) for a, b in zip(first, second, strict=True)]


bradley_terry.pairwise = True  # type: ignore[attr-defined]


def flagged(function: Any, **flags: Any) -> Any:
    for name, value in flags.items():
        setattr(function, name, value)
    return function


def duel(answer: Any, **flags: Any) -> Any:
    """A pairwise reward that gives an answer for all pairs it is asked about."""

    def judge(first, second, prompts, metadata):
        return answer(first, second) if callable(answer) else answer

    return flagged(judge, pairwise=True, **flags)


# ---- groupwise ----


def test_a_groupwise_reward_is_called_once_per_group_and_its_scores_go_back_to_their_pictures() -> None:
    calls = []

    def ranked(images, prompts, metadata):
        calls.append((len(images), set(prompts), [entry["n"] for entry in metadata]))
        values = [image.getpixel((0, 0)) for image in images]
        return [Score(sorted(values).index(value), note=f"of {len(values)}") for value in values]

    flagged(ranked, groupwise=True)
    prompts = ["cat", "dog", "cat", "dog"]
    found = score(ranked, IMAGES, prompts, [{"n": n} for n in range(4)])
    assert calls == [(2, {"cat"}, [0, 2]), (2, {"dog"}, [1, 3])]
    assert found.values.tolist() == [0, 0, 1, 1]
    assert found.notes == dict.fromkeys(range(4), "of 2")


def test_groups_are_told_apart_even_where_their_prompts_are_equal() -> None:
    sizes = []

    def count(images, prompts, metadata):
        sizes.append(len(images))
        return {"a": [1.0] * len(images), "b": [None, *range(1, len(images))]}

    flagged(count, groupwise=True)
    found = score(count, IMAGES, PROMPTS, METADATA, groups=[0, 0, 1, 1])
    assert sizes == [2, 2]
    np.testing.assert_array_equal(found.values, [np.nan, 2, np.nan, 2])
    assert found.reasons == {0: "b: None", 2: "b: None"}
    np.testing.assert_array_equal(found.components["b"], [np.nan, 1, np.nan, 1])


def test_the_background_and_the_time_limit_pass_the_groups_and_the_flags_on() -> None:
    with Background(within(bradley_terry, 60)) as judge:
        found = judge.submit(IMAGES, PROMPTS, METADATA, [0, 0, 1, 1]).result(timeout=10)
    expected = [1 / (1 + math.exp(0.5)), 1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(1.5)), 1 / (1 + math.exp(-1.5))]
    np.testing.assert_allclose(found.values, expected)


# ---- pairwise ----


def test_win_rates_are_the_mean_probability_of_winning_against_each_other_picture() -> None:
    """p(0, 1) = .9, p(1, 0) = .3, p(0, 2) = .6: picture 0 beats 1 with (.9 + .7) / 2 = .8, and 2 with .6."""
    asked = [(0, 1), (1, 0), (0, 2), (2, 1)]
    found = win_rates(asked, np.array([0.9, 0.3, 0.6, np.nan]), 4)
    np.testing.assert_allclose(found, [(0.8 + 0.6) / 2, 0.2, 0.4, np.nan])


@pytest.mark.parametrize("symmetric", [False, True])
def test_bradley_terry_strengths_come_back_in_order_with_the_closed_form(symmetric: bool) -> None:
    """Asked in both orders or in one, a symmetric judge gives the same: mean over j of sigmoid(s_i - s_j)."""
    judge = duel(lambda first, second: bradley_terry(first, second, [], []), symmetric=symmetric)
    strengths = np.array(STRENGTHS) / 20
    wins = 1 / (1 + np.exp(strengths[None, :] - strengths[:, None]))
    expected = (wins.sum(1) - 0.5) / 3
    found = score(judge, IMAGES, PROMPTS, METADATA)
    np.testing.assert_allclose(found.values, expected)
    assert found.values.mean() == pytest.approx(0.5)  # of a group without gaps, always
    assert np.all(np.diff(found.values) > 0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_pairs_are_all_within_a_group_and_none_across(symmetric: bool) -> None:
    found = pairs([[0, 1], [2], [3, 4, 5]], symmetric)
    assert len(found) == len(set(found)) == (4 if symmetric else 8)
    assert {frozenset(pair) for pair in found} == {frozenset(p) for p in [(0, 1), (3, 4), (3, 5), (4, 5)]}
    assert symmetric or all((b, a) in found for a, b in found)


def test_a_picture_without_a_comparison_is_missing_with_the_commonest_reason_and_others_go_on() -> None:
    def answer(first: list, second: list) -> list[Any]:
        known = bradley_terry(first, second, [], [])
        black = [0 in (strength(a), strength(b)) for a, b in zip(first, second, strict=True)]
        return [Score(None, "server 503") if dark else value for dark, value in zip(black, known, strict=True)]

    found = score(duel(answer), IMAGES, PROMPTS, METADATA)
    assert found.reasons == {0: "server 503"}
    without = score(bradley_terry, IMAGES[1:], PROMPTS[1:], METADATA[1:])
    np.testing.assert_allclose(found.values[1:], without.values)  # as if the picture were not there


def test_a_picture_that_is_alone_is_missing_and_nobody_is_asked() -> None:
    found = score(duel(lambda *_: pytest.fail("asked")), IMAGES[:2], ["a", "b"], METADATA[:2])
    assert np.isnan(found.values).all()
    assert found.reasons == {0: ALONE, 1: ALONE}


def test_notes_of_pairs_are_kept_with_the_picture_that_came_first() -> None:
    judge = duel(lambda first, second: [Score(0.5, note="alike")] * len(first), symmetric=True)
    assert score(judge, IMAGES[:3], PROMPTS[:3], METADATA[:3]).notes == {
        0: "against 1: alike\nagainst 2: alike",
        1: "against 2: alike",
    }


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ([0.5], "reward judge returned 1 score(s) for 2 pair(s); return one per pair"),
        ([0.5, 1.5], "reward judge returned 1.5 for a pair; return the probability"),
        ([-0.1, 0.5], "returned -0.1 for a pair"),
        ([True, 0.5], "a truth value (True) for pair 0 ('a cat')"),
        (["a", 0.5], "text ('a') for pair 0"),
        (None, "returned None for 2 pair(s)"),
        (np.ones((2, 1)), "list of lists"),
        ({"p": [0.5, 0.5]}, "returned named lists for 2 pairs"),
    ],
)
def test_what_is_no_probability_per_pair_is_refused(answer: Any, says: str) -> None:
    with pytest.raises(RewardError) as caught:
        score(duel(lambda *_: answer), IMAGES[:2], PROMPTS[:2], METADATA[:2])
    assert says in str(caught.value)


def test_nan_and_infinite_probabilities_are_missing_comparisons() -> None:
    found = score(duel([float("nan"), float("inf")]), IMAGES[:2], PROMPTS[:2], METADATA[:2])
    assert np.isnan(found.values).all()
    assert set(found.reasons.values()) <= {"NaN", "inf"}


def test_a_failing_pairwise_reward_is_named() -> None:
    with pytest.raises(RewardError, match=r"reward judge failed on 12 image.*ZeroDivisionError.*test_reward_groups"):
        score(duel(lambda *_: 1 / 0), IMAGES, PROMPTS, METADATA)


# ---- what is refused before the start ----


def test_batches_that_split_groups_are_refused_with_the_cure() -> None:
    check_groups(bradley_terry, 8, 4)
    mixed = Mix((Part("duel", bradley_terry), Part("one", len)))
    for reward in (bradley_terry, mixed):
        with pytest.raises(ConfigError, match=r"a batch of 6 splits groups of 4; make train.batch_size .* such as 4"):
            check_groups(reward, 6, 4)
        with pytest.raises(ConfigError, match=r"train\.group_size is 1; make it at least 2"):
            check_groups(reward, 6, 1)
    check_groups(len, 6, 4)


def test_a_reward_that_compares_has_no_gradient_per_picture() -> None:
    judge = duel(None, differentiable=True)
    with pytest.raises(ConfigError, match="DRaFT differentiates the reward picture by picture, and judge compares"):
        check_gradient(judge, "DRaFT")
