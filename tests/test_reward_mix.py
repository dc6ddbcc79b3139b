"""Sums of rewards: weights, scales, what is missing, gradients; the report before training; too many missing."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tiller.reward_spec import Scale
from tiller.rewards import Background, score
from tiller.rewards.check import check_gradient, too_many_missing
from tiller.rewards.gradient import score_with_graph
from tiller.rewards.mix import Mix, Part
from tiller.rewards.redact import redacted
from tiller.rewards.scale import Beside, beside, correlations, scaled, scales, unmeasured
from tiller.run import rewards as recorded
from tiller.types import ConfigError, RewardError, RunError, Score, Scores, join_scores

IMAGES = [Image.new("RGB", (4, 4), (value, 0, 0)) for value in (0, 51, 102, 255)]
PROMPTS, METADATA = ["a"] * 4, [{}] * 4


def red(images: Any, prompts: Any, metadata: Any) -> list[float]:
    return [image.getpixel((0, 0))[0] / 255 for image in images]


def gives(*values: Any) -> Any:
    def judge(images, prompts, metadata):
        return list(values)

    return judge


def smooth(pictures: Any, prompts: Any, metadata: Any) -> Any:
    return pictures[:, 0].mean((1, 2)) ** 2


smooth.differentiable = True  # type: ignore[attr-defined]


def scored(*parts: Part) -> Scores:
    return score(Mix(parts), IMAGES, PROMPTS, METADATA)


# ---- sums ----


def test_the_total_is_the_weighted_sum_of_scaled_scores_and_the_parts_stay_raw() -> None:
    found = scored(Part("red", red, 2.0, scale=Scale(0.5, 0.25)), Part("other", gives(1, 2, 3, 4), -0.5))
    raw = np.array([0, 0.2, 0.4, 1.0])
    np.testing.assert_allclose(found.values, 2 * (raw - 0.5) / 0.25 - 0.5 * np.array([1, 2, 3, 4]))
    np.testing.assert_allclose(found.components["red"], raw)
    assert found.components["other"].tolist() == [1, 2, 3, 4]


def test_a_total_is_missing_where_any_part_that_counts_is_and_says_which() -> None:
    partly, never = gives(Score(None, "no answer"), 1, None, 1), gives(None, None, None, None)
    found = scored(Part("red", red), Part("judge", partly), Part("logged", never, 0.0))
    np.testing.assert_allclose(found.values, [np.nan, 1.2, np.nan, 2.0])
    assert found.reasons == {0: "judge: no answer", 2: "judge: None"}
    assert np.isnan(found.components["logged"]).all()
    both = scored(Part("a", gives(None, 1, 1, 1)), Part("b", gives(Score(None, "b is away"), 1, 1, 1)))
    assert both.reasons == {0: "a: None; b: b is away"}


def test_notes_come_with_the_name_of_their_part_and_named_scores_inside_a_part_too() -> None:
    named = lambda *_: {"x": [1, 2, 3, Score(4, note="hm")], "y": [0, 0, 0, None]}  # noqa: E731
    found = scored(Part("j", named), Part("red", red))
    assert found.notes == {3: "j: x: hm"}
    assert found.reasons == {3: "j: y: None"}
    assert list(found.components) == ["j", "j/x", "j/y", "red"]
    assert found.components["j/x"].tolist() == [1, 2, 3, 4]


def test_joined_scores_keep_notes_at_their_place() -> None:
    part = Scores(np.array([1.0, np.nan]), {}, {1: "why"}, {0: "first"})
    joined = join_scores([part, part])
    assert joined.notes == {0: "first", 2: "first"}
    assert joined.reasons == {1: "why", 3: "why"}


def test_a_pairwise_part_is_compared_by_groups_within_the_sum() -> None:
    def brighter(first: Any, second: Any, prompts: Any, metadata: Any) -> list[float]:
        return [float(a.getpixel((0, 0))[0] > b.getpixel((0, 0))[0]) for a, b in zip(first, second, strict=True)]

    brighter.pairwise = True  # type: ignore[attr-defined]
    mixed = Mix((Part("duel", brighter), Part("red", red, 10.0)))
    found = score(mixed, IMAGES, PROMPTS, METADATA, groups=[0, 0, 1, 1])
    np.testing.assert_allclose(found.values, [0 + 0, 1 + 2, 0 + 4, 1 + 10])


# ---- workers ----


@pytest.mark.parametrize("allowed", [1, 2])
def test_no_part_is_called_more_often_at_once_than_it_allows(allowed: int) -> None:
    running, most, lock = [0, 0], [0, 0], threading.Lock()

    def counted(place: int) -> Any:
        def judge(images, prompts, metadata):
            with lock:
                running[place] += 1
                most[place] = max(most[place], running[place])
            time.sleep(0.02)
            with lock:
                running[place] -= 1
            return [1.0] * len(images)

        return judge

    wide, narrow = counted(0), counted(1)
    wide.workers, narrow.workers = 3, allowed
    with Background(Mix((Part("wide", wide), Part("narrow", narrow)))) as judge:
        pending = [judge.submit(IMAGES[:1], ["a"], [{}]) for _ in range(9)]
        assert [future.result(timeout=10).values.tolist() for future in pending] == [[2.0]] * 9
    assert most[0] > 1
    assert most[1] == allowed


# ---- gradients ----


def test_a_sum_of_rewards_with_gradients_has_the_sum_of_their_gradients() -> None:
    mixed = Mix((Part("a", smooth, 3.0, scale=Scale(1.0, 0.5)), Part("b", smooth, 1.0)))
    pictures = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    total = score_with_graph(mixed, pictures, ["a", "b"], [{}, {}])
    mean = pictures.detach()[:, 0].mean((1, 2))
    torch.testing.assert_close(total.detach(), 3 * (mean**2 - 1) / 0.5 + mean**2)
    total.sum().backward()
    expected = torch.zeros_like(pictures)
    expected[:, 0] = (7 * 2 * mean / 16)[:, None, None]
    torch.testing.assert_close(pictures.grad, expected)
    assert score(mixed, IMAGES, PROMPTS, METADATA).values[3] == pytest.approx(1.0)  # 3 * (1 - 1) / .5 + 1, by value


def test_a_part_without_a_gradient_is_named_unless_it_is_only_logged() -> None:
    check_gradient(Mix((Part("a", smooth), Part("logged", red, 0.0))), "DRaFT")
    with pytest.raises(ConfigError, match="DRaFT differentiates the reward, and red is not differentiable"):
        check_gradient(Mix((Part("a", smooth), Part("red", red))), "DRaFT")


# ---- the report ----


def reported(a: list[float], b: list[float], **of_b: Any) -> Beside:
    mixed = Mix((Part("a", gives(*a)), Part("b", gives(*b), **of_b)))
    return beside(mixed, score(mixed, IMAGES, PROMPTS, METADATA))


def test_a_scale_is_measured_once_and_makes_mean_0_and_std_1() -> None:
    mixed = Mix((Part("red", red, normalise=True), Part("b", gives(0, 0, 0, 1), normalise=True, scale=Scale(5, 2))))
    assert unmeasured(mixed) == ["red"]
    measured = scaled(mixed, score(mixed, IMAGES, PROMPTS, METADATA))
    assert unmeasured(measured) == []
    raw = np.array([0, 0.2, 0.4, 1.0])
    assert scales(measured) == {"red": Scale(raw.mean(), raw.std()), "b": Scale(5, 2)}
    found = score(Mix((measured.parts[0],)), IMAGES, PROMPTS, METADATA)
    assert found.values.mean() == pytest.approx(0)
    assert found.values.std() == pytest.approx(1)
    assert score(Mix((measured.parts[0],)), IMAGES[3:], ["a"], [{}]).values[0] == pytest.approx((1 - 0.4) / raw.std())


@pytest.mark.parametrize(("values", "says"), [([2, 2, 2, None], "the same score .2."), ([None] * 4, "no score")])
def test_what_does_not_vary_cannot_be_normalised(values: list, says: str) -> None:
    mixed = Mix((Part("flat", gives(*values), normalise=True),))
    with pytest.raises(RewardError, match=rf"reward flat cannot be normalised: it gave {says} to all of 4 pictures"):
        scaled(mixed, score(mixed, IMAGES, PROMPTS, METADATA))


def test_the_report_tells_every_reward_s_numbers_and_correlations() -> None:
    found = reported([1, 2, 3, 4], [2, None, 1, 5])
    b = found.rewards["b"]
    assert (b.mean, b.min, b.max, b.missing, b.weight) == (pytest.approx(8 / 3), 1, 5, 0.25, 1.0)
    assert b.std == pytest.approx(np.std([2, 1, 5]))
    expected = np.corrcoef([1, 3, 4], [2, 1, 5])[0, 1]  # over the pictures that have both
    assert [found.correlations[0][1], found.correlations[1][0]] == pytest.approx([expected, expected])
    assert found.correlations[0][0] == pytest.approx(1)
    assert correlations([np.ones(4), np.arange(4.0)]) == [[None, None], [None, pytest.approx(1)]]


@pytest.mark.parametrize(
    ("a", "b", "of_b", "says"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4.5], {}, "a and b ask for nearly the same"),
        ([1, 2, 3, 4], [4, 1, 3, 1], {}, "a and b pull against each other"),
        ([1, 2, 3, 4], [10, 60, 20, 70], {}, "b varies"),
        ([1, 2, 3, 4], [10, 60, 20, 70], {"scale": Scale(0, 25)}, None),
        ([1, 2, 3, 4], [10, 60, 20, 70], {"weight": 0.05}, None),
        ([1, 2, 3, 4], [1, 4, 2, 3], {}, None),
        ([1, 2, 3, 4], [2, 2, 2, 2], {}, "b does not vary"),
    ],
)
def test_what_is_odd_is_warned_of(a: list, b: list, of_b: dict, says: str | None) -> None:
    warnings = " ".join(reported(a, b, **of_b).warnings)
    assert (says in warnings) if says else not warnings


def test_the_table_shows_it_and_the_file_gives_the_scales_back(tmp_path: Path) -> None:
    from rich.console import Console

    from tiller.report.rewards import table

    mixed = Mix((Part("red", red, normalise=True), Part("b", gives(0, 1, None, 1), 0.5)))
    scores = score(mixed, IMAGES, PROMPTS, METADATA)
    measured = scaled(mixed, scores)
    console = Console(width=140)
    with console.capture() as shown:
        console.print(table(beside(measured, scores)))
    assert "1 red" in shown.get()
    assert "25%" in shown.get()
    recorded.write(tmp_path, beside(measured, scores))
    assert scales(recorded.restored(tmp_path, mixed)) == scales(measured)  # to the last bit
    assert recorded.fingerprint(recorded.restored(tmp_path, mixed)) == recorded.fingerprint(measured)


def test_a_recorded_scale_that_is_gone_or_another_is_refused(tmp_path: Path) -> None:
    mixed = Mix((Part("red", red, normalise=True),))
    with pytest.raises(RunError, match=r"rewards\.json is missing, and with it the scale of red"):
        recorded.restored(tmp_path, mixed)
    fixed = Mix((Part("red", red, normalise=True, scale=Scale(0, 1)),))
    recorded.write(tmp_path, beside(fixed, score(fixed, IMAGES, PROMPTS, METADATA)))
    other = Mix((Part("red", red, normalise=True, scale=Scale(0, 2)),))
    with pytest.raises(RunError, match="as the scale of red, and the recipe"):
        recorded.restored(tmp_path, other)
    (tmp_path / "rewards.json").write_text('{"rewards": [1]}')
    with pytest.raises(RunError, match="damaged"):
        recorded.restored(tmp_path, mixed)


# ---- too many missing ----


def test_too_many_missing_names_the_reward_the_share_and_the_commonest_reasons() -> None:
    away = gives(Score(None, "server 503"), Score(None, "server 503"), Score(None, "timeout"), 1)
    mixed = Mix((Part("red", red), Part("judge", away)))
    found = score(mixed, IMAGES, PROMPTS, METADATA)
    said = too_many_missing(found, mixed, 0.5)
    assert said.startswith("reward judge gave no score to 3 of 4 pictures (75%, more than the 50% that max_missing")
    assert "server 503 (2 times); timeout (1 times)" in said
    assert too_many_missing(found, mixed, 0.75) == ""
    assert too_many_missing(found, mixed, 1.0) == ""


def test_a_part_may_have_a_limit_of_its_own_and_one_that_is_only_logged_has_none() -> None:
    half = gives(None, None, 1, 1)
    strict = Mix((Part("red", red), Part("judge", half, max_missing=0.25)))
    assert "more than the 25%" in too_many_missing(score(strict, IMAGES, PROMPTS, METADATA), strict, 1.0)
    logged = Mix((Part("red", red), Part("judge", gives(*[None] * 4), 0.0)))
    assert too_many_missing(score(logged, IMAGES, PROMPTS, METADATA), logged, 0.0) == ""
    bare = gives(None, math.nan, 1, 1)
    said = too_many_missing(score(bare, IMAGES, PROMPTS, METADATA), bare, 0.25)
    assert "reward judge gave no score to 2 of 4 pictures (50%, more than the 25%" in said
    assert "None (1 times); NaN (1 times)" in said


def test_two_parts_that_are_each_there_often_enough_may_leave_too_few_sums() -> None:
    mixed = Mix((Part("a", gives(None, None, 1, 1)), Part("b", gives(1, 1, None, 1))))
    found = score(mixed, IMAGES, PROMPTS, METADATA)
    said = too_many_missing(found, mixed, 0.5)
    assert said.startswith("reward a + b gave no score to 3 of 4 pictures (75%")
    assert "a: None (2 times); b: None (1 times)" in said


# ---- secrets ----


def test_secrets_of_the_environment_are_taken_out_of_reasons_notes_and_messages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "sk-very-secret")
    monkeypatch.setenv("PLAIN", "not-so-secret")
    assert redacted("Bearer sk-very-secret, not-so-secret") == "Bearer [JUDGE_API_KEY], not-so-secret"
    found = scored(Part("a", gives(Score(None, "401 for sk-very-secret"), Score(1, note="sk-very-secret"), 1, 1)))
    assert found.reasons == {0: "a: 401 for [JUDGE_API_KEY]"}
    assert found.notes == {1: "a: [JUDGE_API_KEY]"}

    def judge(images, prompts, metadata):
        raise ValueError("key sk-very-secret was refused")

    with pytest.raises(RewardError, match=r"key \[JUDGE_API_KEY\] was refused"):
        score(judge, IMAGES, PROMPTS, METADATA)
