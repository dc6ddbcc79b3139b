"""Over-optimisation: the statistics of pictures in closed form, and the rules on evaluations made by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tiller.evaluation.drift import diversity, spread, thumbnails
from tiller.evaluation.held_out import Evaluated
from tiller.evaluation.in_run import Look, evenly, few, metrics, pooled
from tiller.evaluation.monitor import Monitor, Seen, findings, in_words
from tiller.evaluation.paired import Comparison
from tiller.evaluation.statistics import mean_statistics, statistics
from tiller.settings import MonitorRules
from tiller.types import ConfigError, Prompt


def picture(array: np.ndarray) -> Image.Image:
    return Image.fromarray(array.astype(np.uint8))


def comparison(difference: float, low: float, high: float, tuned: float = 0.5) -> Comparison:
    return Comparison(tuned - difference, tuned, difference, low, high, 0.5, 24)


def seen(epoch: int = 1, **changes: Any) -> Seen:
    """An evaluation in which the reward rose and nothing was lost."""
    healthy = {"score": comparison(0.3, 0.2, 0.4, tuned=0.3), "gold": comparison(0.0, -0.1, 0.1)}
    whole = {"compared": healthy, "trained": "score", "statistics": {"edges": (0.1, 0.11), "blank": (0.2, 0.3)}}
    return Seen(epoch, **{**whole, "diversity": (0.2, 0.18), "kl": 30.0, **changes})


# ---- what pictures look like ----


def test_an_empty_picture_has_nothing_and_is_blank() -> None:
    assert statistics(picture(np.full((64, 64, 3), 128))) == {
        "edges": 0.0,
        "entropy": 0.0,
        "saturation": 0.0,
        "blank": 1.0,
    }


def test_black_beside_white_is_one_bit_and_one_edge() -> None:
    """Central differences see the border in two columns, at half its height each."""
    half = np.zeros((64, 64, 3))
    half[:, 32:] = 255
    found = statistics(picture(half))
    assert found["entropy"] == pytest.approx(1.0)
    assert found["edges"] == pytest.approx(2 * 0.5 / 64)
    assert found["blank"] == 1.0  # the border lies between two blocks
    assert statistics(picture(np.roll(half, 1, axis=1)))["blank"] == pytest.approx(1 - 2 / 8)


def test_saturation_and_a_ramp_by_hand() -> None:
    colour = np.zeros((16, 16, 3))
    colour[:8] = (200, 50, 100)  # (200 - 50)/200; black counts as 0
    assert statistics(picture(colour))["saturation"] == pytest.approx(0.75 / 2)
    ramp = np.repeat(np.arange(256)[None, :, None], 8, 0).repeat(3, 2)
    found = statistics(picture(ramp))
    assert found["edges"] == pytest.approx(1 / 255)
    assert found["entropy"] == pytest.approx(8.0)


def test_what_is_no_still_picture_has_no_statistics() -> None:
    assert mean_statistics([np.zeros(3), None]) == {}  # type: ignore[list-item]
    both = [picture(np.zeros((8, 8, 3))), picture(np.full((8, 8, 3), (255, 0, 0)))]
    assert mean_statistics(both)["saturation"] == pytest.approx(0.5)


# ---- the rules ----


def test_a_healthy_evaluation_finds_nothing() -> None:
    assert findings(seen(), MonitorRules()) == []


@pytest.mark.parametrize(
    ("changes", "rule", "text"),
    [
        ({"compared": {"gold": comparison(-0.4, -0.5, -0.3)}}, "lost", "gold fell by 0.4 (95 % 0.3 to 0.5)"),
        ({"diversity": (0.2, 0.08)}, "diversity", "pictures of one prompt differ by 40% of what they did"),
        ({"statistics": {"edges": (0.1, 0.04)}}, "edges", "edges changed by -60%"),
        ({"statistics": {"edges": (0.1, 0.16)}}, "edges", "edges changed by +60%"),
        ({"statistics": {"blank": (0.2, 0.7)}}, "blank", "50% more of the pictures is blank"),
    ],
)
def test_each_rule_says_what_was_lost(changes: dict[str, Any], rule: str, text: str) -> None:
    (found,) = findings(seen(**changes), MonitorRules())
    assert found.rule == rule
    assert text in found.text
    assert findings(seen(**changes), MonitorRules(action="off")) == []


def test_the_thresholds_are_what_decides() -> None:
    fell = seen(compared={"gold": comparison(-0.4, -0.5, -0.3)})
    assert len(findings(fell, MonitorRules(lost=0.29))) == 1
    assert findings(fell, MonitorRules(lost=0.31)) == []
    assert [one.rule for one in findings(seen(), MonitorRules(kl=29.0))] == ["kl"]
    assert findings(seen(kl=None), MonitorRules(kl=29.0)) == []
    assert findings(seen(statistics={"edges": (0.0, 0.1)}, diversity=(0.0, 0.0)), MonitorRules()) == []


def test_the_trained_reward_may_fall_without_being_lost() -> None:
    """That it falls is what the reward curve is for."""
    assert findings(seen(compared={"score": comparison(-0.4, -0.5, -0.3)}), MonitorRules()) == []


def test_patience_counts_evaluations_in_a_row() -> None:
    bad = {"diversity": (0.2, 0.01)}
    monitor = Monitor(MonitorRules(action="stop", patience=2))
    acts = [monitor.see(seen(epoch, **change)).acts for epoch, change in enumerate([bad, {}, bad, bad, {}])]
    assert acts == [False, False, False, True, False]
    assert monitor.acted == [3]
    assert monitor.ended
    assert not any(Monitor(MonitorRules(patience=1)).see(seen(0, **bad)).acts for _ in range(3))  # only warns


def test_the_best_is_the_highest_score_that_lost_nothing() -> None:
    def at(epoch: int, score: float, lost: bool = False) -> Seen:
        gold = comparison(-0.4, -0.5, -0.3) if lost else comparison(0, -0.1, 0.1)
        return seen(epoch, compared={"score": comparison(score, score, score, tuned=score), "gold": gold})

    monitor = Monitor(MonitorRules(action="roll_back"))
    best = [monitor.see(one).best for one in (at(1, 0.1), at(2, 0.5), at(3, 0.4), at(4, 0.9, True), at(5, 0.95, True))]
    assert best == [True, True, False, False, False]
    assert monitor.best == (2, 0.5)
    assert monitor.ended


def test_the_learning_rate_is_lowered_once_for_every_time_patience_is_over() -> None:
    monitor = Monitor(MonitorRules(action="lower_rate", patience=2, rate_factor=0.1))
    for epoch in range(5):
        monitor.see(seen(epoch, diversity=(0.2, 0.01)))
    assert monitor.acted == [1, 3]
    assert monitor.rate == pytest.approx(0.01)
    assert not monitor.ended


def test_an_evaluation_comes_back_from_its_line() -> None:
    one = seen(7, diversity=None)
    again = Seen.from_data(json.loads(json.dumps(one.to_data())))
    assert again == one
    assert "diversity" not in in_words(Monitor(MonitorRules()).see(again))


@pytest.mark.parametrize("wrong", [{"patience": 0}, {"rate_factor": 1.0}, {"lost": -1.0}, {"kl": -2.0}])
def test_rules_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        MonitorRules(**wrong)


# ---- which prompts, which pictures ----


def test_a_few_prompts_are_spread_evenly_and_the_trained_ones_are_among_the_splits() -> None:
    prompts = [Prompt(str(number)) for number in range(10)]
    assert [prompt.text for prompt in evenly(prompts, 8)] == ["0", "2", "5", "7"]
    assert len(evenly(prompts, 100)) == 10
    assert len(evenly(prompts, 1)) == 1
    assert list(few({"unseen": prompts}, prompts[:2], 4)) == ["trained", "unseen"]
    assert list(few({"trained": prompts}, prompts[:2], 4)["trained"]) == [prompts[0], prompts[5]]


def test_held_out_splits_are_pooled_and_missing_scores_left_out() -> None:
    def model(**splits: list[float]) -> dict[str, Evaluated]:
        return {name: Evaluated(tuple("ab"), {"gold": np.array(values)}) for name, values in splits.items()}

    base = model(trained=[9.0, 9.0], animals=[0.0, 1.0], objects=[0.0, math.nan])
    now = model(trained=[0.0, 0.0], animals=[1.0, 1.0], objects=[0.5, 1.0])
    found = pooled(base, now)["gold"]
    assert (found.count, found.base, found.tuned) == (3, pytest.approx(1 / 3), pytest.approx(2.5 / 3))
    assert pooled({"trained": base["trained"]}, {"trained": now["trained"]})["gold"].difference == -9.0
    assert pooled(model(a=[math.nan, math.nan]), model(a=[1.0, 1.0])) == {}


def test_distances_of_thumbnails_are_root_mean_square_differences_and_come_back_from_the_file() -> None:
    """Black, white and grey of 51: differences of 1, .2 and .8 in every number."""
    shades = [picture(np.full((32, 32, 3), value)) for value in (0, 255, 51, 0)]
    vectors = thumbnails(shades)
    assert spread(vectors, 2) == pytest.approx((1 + 0.2) / 2, rel=1e-6)
    assert diversity(shades, 4) == pytest.approx((1 + 0.2 + 0 + 0.8 + 1 + 0.2) / 6, rel=1e-6)
    look = Look({}, {}, 0.6, vectors)
    again = Look.from_data(json.loads(json.dumps(look.to_data(), allow_nan=False)))
    np.testing.assert_array_equal(again.vectors, vectors)
    assert again.diversity == 0.6
    assert metrics(seen(distance=0.25), look)["drift/distance"] == 0.25
    nothing = Look.from_data(Look({}, {}, math.nan, np.zeros((0, 0), np.float32)).to_data())
    assert math.isnan(nothing.diversity)
