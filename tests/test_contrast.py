"""Contrastive prompts, the softmax over them, and the penalty of inconsistency, against closed forms."""

from __future__ import annotations

import math
import random

import pytest
import torch
from PIL import Image

from tiller import prompts
from tiller.prompts.closeness import meaning, vectors
from tiller.prompts.contrast import by_lists, by_writer, contrasted, one_word_changed
from tiller.rewards import resolve, score
from tiller.rewards.consistency import Consistent, inconsistency
from tiller.rewards.contrast import Contrast, contrast
from tiller.rewards.gradient import score_with_graph
from tiller.rewards.judge.encoder import TextEncoder
from tiller.types import ConfigError, Prompt, Score
from tiny_bert import tiny_bert

PICTURES = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]


def changed(text: str, metadata: dict | None = None, count: int = 1000) -> dict[str, dict]:
    found = by_lists(Prompt(text, metadata or {}), count, random.Random(0))
    return {entry["prompt"]: entry for entry in found}


# ---- changed prompts ----


def test_a_noun_is_changed_with_its_article_and_its_metadata() -> None:
    found = changed("a cat washing dishes", {"noun": "cat", "count": 1, "activity": "washing dishes"})
    assert found["an ant washing dishes"] == {
        "prompt": "an ant washing dishes",
        "noun": "ant",
        "count": 1,
        "activity": "washing dishes",
    }
    assert found["a cat playing chess"]["activity"] == "playing chess"
    assert "a cat washing dishes" not in found


def test_counts_change_the_number_or_the_plural() -> None:
    found = changed("two wolves", {"noun": "wolf", "count": 2})
    assert found["four wolves"] == {"prompt": "four wolves", "noun": "wolf", "count": 4}
    assert found["two mice"] == {"prompt": "two mice", "noun": "mouse", "count": 2}
    assert "one wolves" not in found
    assert len(found) == 2 + 44


def test_the_word_of_an_activity_is_not_taken_for_an_object() -> None:
    found = changed("a cat reading a book")
    assert "a cat reading a pizza" not in found
    assert "a cat playing ball" in found
    assert "a book" not in " ".join(text for text in found if text.startswith("a cat") and "reading" not in text)


def test_colours_and_relations_change() -> None:
    found = changed("a red apple left of a cup")
    assert "a blue apple left of a cup" in found
    assert "a red apple above a cup" in found
    assert "a red umbrella left of a cup" in found


def test_every_prompt_of_the_built_in_sets_can_be_contrasted_and_the_same_seed_changes_the_same() -> None:
    for name in prompts.SETS:
        source = prompts.load(name)
        made = contrasted(source, 3, seed=1)
        assert len(made) == len(source)
        assert contrasted(source, 3, seed=1) == made
    assert contrasted([Prompt("nothing of this kind")], 3) == []


@pytest.mark.parametrize(
    ("first", "second", "one"),
    [
        ("a cat sleeps", "a dog sleeps", True),
        ("a cat sleeps", "an owl sleeps", True),
        ("a cat sleeps", "a cat sleeps", False),
        ("a cat sleeps", "two cats sleep", False),
        ("a cat sleeps", "a cats sleeps", False),
        ("a cat sleeps", "a black cat sleeps", False),
    ],
)
def test_exactly_one_word_differs(first, second, one) -> None:
    assert one_word_changed(first, second) is one


def test_a_models_changes_are_checked() -> None:
    class Writer:
        def ask(self, images, questions):
            return ["1. a dog sleeps\n2. a dog sleeps\n3. two dogs play\n4. a cat sleeps\n5. a cat runs\n6. a cat eats"]

    found = by_writer(Writer(), Prompt("a cat sleeps"), 2)
    assert found == [{"prompt": "a dog sleeps"}, {"prompt": "a cat runs"}]


# ---- the contrast reward ----


def table(scores: dict[str, float | None]):
    """An inner reward that knows the score of each prompt, and remembers the metadata it was given."""

    def reward(images, prompts, metadata):
        seen.extend(metadata)
        return [Score(None, reason="no idea") if scores[prompt] is None else scores[prompt] for prompt in prompts]

    seen: list = []
    reward.seen = seen
    return reward


def test_the_softmax_by_hand() -> None:
    assert math.exp(contrast(torch.tensor([1.0, 0.0, 0.0]), 1.0)) == pytest.approx(math.e / (math.e + 2))
    assert math.exp(contrast(torch.tensor([0.3, 0.1]), 0.1)) == pytest.approx(1 / (1 + math.exp(-2)))
    shifted = contrast(torch.tensor([5.3, 5.1]), 0.1)  # what all prompts gain alike cancels
    assert shifted == pytest.approx(float(contrast(torch.tensor([0.3, 0.1]), 0.1)), abs=1e-5)


def test_contrast_scores_pictures_with_all_prompts_of_theirs() -> None:
    inner = table({"a cat": 0.3, "a dog": 0.1, "a cow": 0.1, "a bee": 0.2, "an ant": 0.4})
    metadata = [
        {"contrast": ["a dog", {"prompt": "a cow", "noun": "cow"}]},
        {"contrast": ["an ant"]},
    ]
    answered = Contrast(inner, temperature=0.1)(PICTURES, ["a cat", "a bee"], metadata)
    assert answered[0].value == pytest.approx(1 / (1 + 2 * math.exp(-2)))
    assert answered[1].value == pytest.approx(1 / (1 + math.exp(2)))
    assert answered[0].note == "a cat: 0.3, a dog: 0.1, a cow: 0.1"
    assert inner.seen[2] == {"noun": "cow"}
    logged = Contrast(inner, temperature=0.1, log=True)(PICTURES[:1], ["a cat"], metadata[:1])[0].value
    assert logged == pytest.approx(-math.log(1 + 2 * math.exp(-2)))


def test_contrast_is_missing_where_anything_is_missing() -> None:
    inner = table({"a cat": 0.3, "a dog": None})
    found = score(Contrast(inner), PICTURES, ["a cat"] * 2, [{"contrast": ["a dog"]}, {}])
    assert not found.valid.any()
    assert found.reasons == {0: "a dog: no idea", 1: "the prompt has no contrast in its metadata"}


def test_contrast_has_the_gradient_of_the_softmax() -> None:
    def inner(pictures, prompts, metadata):
        """The mean of the channel that the prompt names."""
        return torch.stack([picture[int(prompt)].mean() for picture, prompt in zip(pictures, prompts, strict=True)])

    inner.differentiable = True
    reward = Contrast(inner, temperature=0.5)
    assert reward.differentiable
    pictures = torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    values = score_with_graph(reward, pictures, ["0", "1"], [{"contrast": ["1", "2"]}, {"contrast": ["0"]}])
    means = pictures.detach().mean((2, 3))
    first = (means[0] / 0.5).softmax(0)[0]
    assert values[0].item() == pytest.approx(float(first), abs=1e-6)
    values.sum().backward()
    assert pictures.grad[0, 0, 0, 0].item() == pytest.approx(float(first * (1 - first)) / 0.5 / 4, abs=1e-6)
    assert pictures.grad[1, 2].abs().sum() == 0


def test_inner_rewards_that_cannot_be_are_refused() -> None:
    def compares(images, prompts, metadata):
        return [0.0] * len(images)

    compares.groupwise = True
    with pytest.raises(ConfigError, match="compares pictures with each other"):
        Contrast(compares)([], [], [])
    with pytest.raises(ConfigError, match="not a list"):
        Contrast(["jpeg_compressibility", "jpeg_compressibility"])([], [], [])
    with pytest.raises(ConfigError, match="temperature is 0"):
        Contrast(temperature=0.0)
    assert not resolve("contrast", {"reward": "jpeg_compressibility", "temperature": 1.0}).differentiable


# ---- consistency ----


def test_the_penalty_by_hand() -> None:
    scores = torch.tensor([0.5, 0.3, 0.6])
    same, other = torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0])
    weights = torch.tensor([1.0, 0.5])
    # of one meaning: |.2| and |-.1|; of another, with a margin of .25: .05 and .35
    assert float(inconsistency(scores, weights, same, 0.25)) == pytest.approx((0.2 + 0.5 * 0.1) / 1.5)
    assert float(inconsistency(scores, weights, other, 0.25)) == pytest.approx((0.05 + 0.5 * 0.35) / 1.5)
    half = torch.tensor([0.5, 0.5])
    assert float(inconsistency(scores, weights, half, 0.25)) == pytest.approx((0.125 + 0.5 * 0.225) / 1.5)
    assert float(inconsistency(scores, torch.zeros(2), half, 0.25)) == 0.0


def test_a_judge_that_goes_by_the_words_is_penalised(tmp_path) -> None:
    """A paraphrase that scores less and a changed prompt that scores the same both cost."""
    text = TextEncoder(tiny_bert(tmp_path), layer=2)
    metadata = [{"paraphrases": ["a mat under a cat"], "contrast": ["a cat on a hat"]}]
    asked = ["a cat on a mat", "a mat under a cat", "a cat on a hat"]
    settings = {"strength": 2.0, "margin": 0.1, "apart": 0.5, "text": text}
    by_words = Consistent(table(dict(zip(asked, [0.8, 0.2, 0.8], strict=True))), **settings)
    found = by_words(PICTURES[:1], asked[:1], metadata)[0].value
    read = vectors(text, asked)
    near = meaning(read[0], read[1:], 0.5)
    expected = inconsistency(torch.tensor([0.8, 0.2, 0.8]), torch.tensor([1 - 3 / 5, 1 - 1 / 5]), near, 0.1)
    assert found == pytest.approx(0.8 - 2 * float(expected), abs=1e-5)
    assert found < 0.8
    free = Consistent(table(dict(zip(asked, [0.8, 0.2, 0.8], strict=True))), strength=0.0, text=text)
    assert free(PICTURES[:1], asked[:1], metadata)[0].value == pytest.approx(0.8)


def test_consistency_needs_variants() -> None:
    answered = Consistent(table({"a cat": 0.3}))(PICTURES[:1], ["a cat"], [{}])[0]
    assert answered == Score(None, reason="the prompt has no contrast or paraphrases in its metadata")
