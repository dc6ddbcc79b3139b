"""What rewards are learned by: losses and calibration in closed form, fits on embeddings whose preference is known."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from tiller.rewards.learned import Head, HeadSettings, losses, stand_in
from tiller.rewards.learned.calibration import calibration, fit_temperature, logistic, wilson
from tiller.rewards.learned.fit import Comparisons, FitSettings, Labels, fit, parts, split
from tiller.types import ConfigError

QUICK = FitSettings(members=2, steps=150, batch=64)
SMALL = HeadSettings(hidden=(32,), dropout=0.0, cosine=0.0)


def test_bradley_terry_by_hand() -> None:
    """-log σ(r_1 - r_2), whose gradient is σ(r_1 - r_2) - y; a tie is the mean of both answers."""
    first = torch.tensor([math.log(3), math.log(3), math.log(3), 0.0], dtype=torch.float64, requires_grad=True)
    second = torch.zeros(4, dtype=torch.float64)
    found = losses.bradley_terry(first, second, torch.tensor([1.0, 0.0, 0.5, 0.5], dtype=torch.float64))
    expected = [math.log(4 / 3), math.log(4), (math.log(4 / 3) + math.log(4)) / 2, math.log(2)]
    torch.testing.assert_close(found.detach(), torch.tensor(expected, dtype=torch.float64))
    found.sum().backward()
    torch.testing.assert_close(first.grad, torch.tensor([-0.25, 0.75, 0.25, 0.0], dtype=torch.float64))


def test_bradley_terry_is_symmetric_and_blind_to_a_shift() -> None:
    """Turning a pair around and its answer with it changes nothing, nor does a constant on both scores."""
    first, second, preferred = torch.randn(3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    preferred = (preferred > 0).double()
    found = losses.bradley_terry(first, second, preferred)
    torch.testing.assert_close(found, losses.bradley_terry(second, first, 1 - preferred))
    torch.testing.assert_close(found, losses.bradley_terry(first + 7, second + 7, preferred))


def test_prompt_classification_by_hand() -> None:
    """With scores T·log 6, 0, 0, 0 the true prompt has 6/9; the gradient is y/T·(softmax - one-hot)."""
    temperature = 2.0
    scores = torch.zeros(3, 4, dtype=torch.float64)
    scores[:, 0] = temperature * math.log(6)
    scores.requires_grad_()
    labels = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    found = losses.prompt_classification(scores, labels, temperature)
    torch.testing.assert_close(found.detach(), math.log(9 / 6) * labels)
    found.sum().backward()
    row = torch.tensor([6 / 9 - 1, 1 / 9, 1 / 9, 1 / 9], dtype=torch.float64) / temperature
    torch.testing.assert_close(scores.grad, labels[:, None] * row)  # none at all for the label 0


def test_prompt_classification_with_the_true_prompt_alone_is_nothing() -> None:
    scores = torch.tensor([[0.3], [-2.0]], requires_grad=True)
    found = losses.prompt_classification(scores, torch.ones(2))
    assert found.tolist() == [0.0, 0.0]
    found.sum().backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [[0.0], [0.0]]


def test_squared_error_by_hand() -> None:
    scores = torch.tensor([0.25, 1.0], requires_grad=True)
    found = losses.squared_error(scores, torch.tensor([1.0, 0.5]))
    assert found.tolist() == [0.5625, 0.25]
    found.sum().backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [-1.5, 1.0]


def test_calibration_by_hand() -> None:
    """A table of three bins: .25 (4 answers, 1 came true), .5 (2, 1), .75 (4, 4)."""
    probabilities = [0.25] * 4 + [0.5] * 2 + [0.75] * 4
    answers = [1, 0, 0, 0, 1, 0, 1, 1, 1, 1]
    found = calibration(probabilities, answers)
    assert [(one.low, one.count, one.said, one.was) for one in found.bins] == [
        (0.2, 4, 0.25, 0.25),
        (0.5, 2, 0.5, 0.5),
        (0.7, 4, 0.75, 1.0),
    ]
    assert found.error == pytest.approx(0.4 * 0.25)
    assert found.accuracy == pytest.approx((3 + 1 + 4) / 10)  # of those at one half, half are right
    wanted = Fraction(3 * 1 + 9, 16) + Fraction(2, 4) + Fraction(4, 16)
    assert found.brier == pytest.approx(float(wanted / 10))
    wanted_loss = -(math.log(0.25) + 3 * math.log(0.75) + 2 * math.log(0.5) + 4 * math.log(0.75)) / 10
    assert found.log_loss == pytest.approx(wanted_loss)


def test_saying_one_half_is_worth_nothing() -> None:
    found = calibration([0.5] * 4, [1, 0, 1, 0])
    assert (found.accuracy, found.brier, found.error) == (0.5, 0.25, 0.0)
    assert found.log_loss == pytest.approx(math.log(2))
    assert not found.beats_chance


def test_certainty_at_the_edges_has_a_bin_and_a_finite_loss() -> None:
    found = calibration([0.0, 1.0, 1.0], [0, 1, 0])
    assert [(one.low, one.count) for one in found.bins] == [(0.0, 1), (0.9, 2)]
    assert math.isfinite(found.log_loss)


def test_what_beats_chance_depends_on_how_rare_the_rarer_answer_is() -> None:
    """45 right of 50 beat a coin, and not somebody who always says yes where 45 are yes."""
    answers = [1] * 45 + [0] * 5
    assert calibration([0.9] * 50, answers).beats_chance
    assert not calibration([0.9] * 50, answers, chance=0.9).beats_chance


def test_wilson_solves_its_equation() -> None:
    """The bounds are the shares p with |share - p| = z·sqrt(p(1 - p)/n)."""
    for share, count in ((0.5, 10), (0.9, 40), (1.0, 8)):
        for bound in wilson(share, count):
            deviation = 1.959964 * math.sqrt(max(bound * (1 - bound), 0) / count)
            assert abs(share - bound) == pytest.approx(deviation, abs=1e-9)


@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
def test_the_temperature_of_simulated_people_is_found(temperature: float) -> None:
    random = np.random.default_rng(3)
    gaps = random.normal(size=40_000) * temperature * 2
    answers = random.random(40_000) < logistic(gaps / temperature)
    assert fit_temperature(gaps, answers) == pytest.approx(temperature, rel=0.04)


def test_temperature_where_there_is_none() -> None:
    """Separable answers, and answers that contradict the scores."""
    assert fit_temperature([1.0, -2.0, 3.0], [1, 0, 1]) == pytest.approx(0.01)
    assert fit_temperature([1.0, -2.0, 3.0], [0, 1, 0]) == pytest.approx(100.0)


def test_calibration_refuses_what_does_not_belong_together() -> None:
    with pytest.raises(ValueError, match="got 2 probabilities and 1 answers"):
        calibration([0.1, 0.2], [1])
    with pytest.raises(ValueError, match="got 0"):
        calibration([], [])


def test_stand_ins_answer_as_bradley_and_terry_say() -> None:
    """Surely at temperature 0, by σ(gap/T) above it; ties within the margin; NaN where a score is missing."""
    random = np.random.default_rng(0)
    said = stand_in.preferences([1, 0, 0.5, math.nan], [0, 1, 0.45, 1], 0.1, 0.0, random)
    np.testing.assert_array_equal(said, [1, 0, 0.5, math.nan])
    many = stand_in.preferences([math.log(3)] * 20_000, [0] * 20_000, 0.0, 1.0, random)
    assert many.mean() == pytest.approx(0.75, abs=4 * math.sqrt(0.75 * 0.25 / 20_000))
    again = stand_in.preferences([math.log(3)] * 20_000, [0] * 20_000, 0.0, 1.0, np.random.default_rng(5))
    same = stand_in.preferences([math.log(3)] * 20_000, [0] * 20_000, 0.0, 1.0, np.random.default_rng(5))
    np.testing.assert_array_equal(again, same)


def test_stand_ins_label() -> None:
    random = np.random.default_rng(0)
    np.testing.assert_array_equal(stand_in.labels([0.2, math.nan, 1], None, 0, random), [0.2, math.nan, 1])
    np.testing.assert_array_equal(stand_in.labels([-3, -1, math.nan], -1, 0, random), [0, 1, math.nan])
    drawn = stand_in.labels([math.log(4)] * 20_000, 0.0, 1.0, random)
    assert drawn.mean() == pytest.approx(0.8, abs=4 * math.sqrt(0.8 * 0.2 / 20_000))
    with pytest.raises(ConfigError, match="give a threshold"):
        stand_in.labels([-3, 1], None, 0, random)


def embedded(count: int, prompts: int = 20, width: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, list]:
    """Pictures (2·count, D), prompts (count, D), names: lengths of 1, as CLIP's are."""
    generator = torch.Generator().manual_seed(seed)
    pictures = normalize(torch.randn(2 * count, width, generator=generator), dim=1)
    texts = normalize(torch.randn(prompts, width, generator=generator), dim=1)
    return pictures, texts[torch.arange(count) % prompts], [f"prompt {row % prompts}" for row in range(count)]


def preferring(count: int, answer) -> Comparisons:
    pictures, prompts, texts = embedded(count)
    first, second = pictures[:count], pictures[count:]
    return Comparisons(first, second, prompts, answer(first, second, prompts), texts)


def held_out_accuracy(data: Comparisons) -> tuple[float, int]:
    fitted, held = split(data.texts, 0.25, seed=0)
    heads, rest = fit(data.take(fitted), SMALL, QUICK), data.take(held)
    with torch.no_grad():
        gaps = torch.stack([h(rest.first, rest.prompts) - h(rest.second, rest.prompts) for h in heads]).mean(0)
    return float(((gaps > 0).float() == rest.preferred).float().mean()), len(held)


def test_a_known_direction_of_preference_is_found_on_prompts_held_out() -> None:
    accuracy, _ = held_out_accuracy(preferring(400, lambda a, b, p: (a[:, 0] > b[:, 0]).float()))
    assert accuracy > 0.8


def test_a_preference_that_depends_on_the_prompt_is_found() -> None:
    """The picture nearer to its prompt is preferred, which no direction of the pictures alone can say."""
    data = preferring(600, lambda a, b, p: ((a - b) * p).sum(1).gt(0).float())
    assert held_out_accuracy(data)[0] > 0.8


def test_coins_teach_nothing() -> None:
    random = torch.Generator().manual_seed(1)
    accuracy, count = held_out_accuracy(preferring(400, lambda a, b, p: torch.rand(400, generator=random).round()))
    low, high = wilson(accuracy, count)
    assert low < 0.5 < high


def test_labels_are_fitted_and_the_changed_prompts_stay_below() -> None:
    """Labels say whether a picture is near its prompt; a changed prompt is that of another scene."""
    pictures, prompts, texts = embedded(400)
    pictures = pictures[:400]
    near = (pictures * prompts).sum(1) > 0
    pictures = normalize(pictures + torch.where(near[:, None], prompts, -prompts), dim=1)
    both = torch.stack([prompts, prompts.roll(1, 0)], dim=1)
    data = Labels(pictures, both, near.float(), texts)
    fitted, held = split(texts, 0.25, seed=0)
    settings = HeadSettings(hidden=(32,), dropout=0.0, cosine=0.0, bounded=True)
    heads, rest = fit(data.take(fitted), settings, QUICK), data.take(held)
    with torch.no_grad():
        said, other = (torch.stack([h(rest.pictures, rest.prompts[:, j]) for h in heads]).mean(0) for j in (0, 1))
    assert ((said > 0.5).float() == rest.labels).float().mean() > 0.9
    assert 0 <= said.min() < said.max() <= 1
    assert (said > other)[rest.labels == 1].float().mean() > 0.8


def test_a_fit_is_the_same_twice_and_leaves_the_generator_alone() -> None:
    data = preferring(60, lambda a, b, p: (a[:, 0] > b[:, 0]).float())
    settings = FitSettings(members=2, steps=5, batch=16)
    before = torch.get_rng_state()
    one, two = (fit(data, HeadSettings(hidden=(8,), dropout=0.5), settings) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    for left, right in zip(one, two, strict=True):
        for name, value in left.state_dict().items():
            assert torch.equal(value, right.state_dict()[name])
    first, second = (head.state_dict()["layers.0.weight"] for head in one)
    assert not torch.equal(first, second)  # members of an ensemble differ


def test_answers_that_are_all_the_same_are_refused() -> None:
    with pytest.raises(ConfigError, match="every comparison is a tie"):
        fit(preferring(30, lambda a, b, p: torch.full((30,), 0.5)), SMALL, QUICK)
    pictures, prompts, texts = embedded(30)
    with pytest.raises(ConfigError, match="every label is 1; give pictures of both kinds"):
        fit(Labels(pictures[:30], prompts[:, None], torch.ones(30), texts), SMALL, QUICK)


def test_prompts_are_held_out_whole() -> None:
    texts = [f"prompt {row % 8}" for row in range(40)]
    fitted, held = split(texts, 0.25, seed=0)
    assert sorted([*fitted, *held]) == list(range(40))
    assert len({texts[row] for row in held}) == 2
    assert not {texts[row] for row in held} & {texts[row] for row in fitted}
    few = split(["one", "two"] * 10, 0.3, seed=0)  # too few prompts: rows are held out
    assert [len(rows) for rows in few] == [14, 6]
    with pytest.raises(ConfigError, match="give more"):
        split(["one"], 0.3, seed=0)


def test_parts_cover_every_row_once_and_keep_prompts_whole() -> None:
    texts = [f"prompt {row % 7}" for row in range(35)]
    found = parts(texts, 5, seed=0)
    assert sorted(np.concatenate(found).tolist()) == list(range(35))
    assert sorted(len(part) for part in found) == [5, 5, 5, 10, 10]
    assert sum(len({texts[row] for row in part}) for part in found) == 7
    assert [len(part) for part in parts(["one"] * 10, 5, seed=0)] == [2] * 5  # too few prompts: rows
    with pytest.raises(ConfigError, match="4 held-out rows are too few to judge by"):
        parts(["one"] * 4, 5, seed=0)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        FitSettings(members=0)
    with pytest.raises(ConfigError, match="dropout"):
        HeadSettings(dropout=1.0)


def test_a_head_sees_the_product_of_picture_and_prompt() -> None:
    """Weights by hand: the sum of the products, times D, is D times the cosine; CLIP's own comes with its gain."""
    head = Head(3, HeadSettings(hidden=(), dropout=0.0, cosine=10.0))
    pictures, prompts = torch.tensor([[0.6, 0.8, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    with torch.no_grad():
        head.layers[0].bias.fill_(0.25)
    assert head(pictures, prompts).item() == pytest.approx(10 * 0.6 + 0.25)  # before anything is learned
    with torch.no_grad():
        head.layers[0].weight.copy_(torch.tensor([[0.0] * 6 + [1.0] * 3]))
        head.gain.fill_(0.5)
    assert head(pictures, prompts).item() == pytest.approx(3 * 0.6 + 0.5 * 10 * 0.6 + 0.25)
