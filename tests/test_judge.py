"""Judges by description and by question, and the guard against written words, with viewers that are scripts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
from PIL import Image, ImageDraw

from tiller.rewards import resolve, score
from tiller.rewards.judge.describe import QUESTION, VLMAlignment
from tiller.rewards.judge.encoder import BertScorer, TextEncoder
from tiller.rewards.judge.questions import VLMCounting, VLMQuestions
from tiller.rewards.judge.viewer import Failure
from tiller.rewards.judge.words import NUMBERS, contains, content_words, says, share_written, words, yes_or_no
from tiller.rewards.judge.written import Veto
from tiller.types import ConfigError
from tiny_bert import tiny_bert


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> TextEncoder:
    return TextEncoder(tiny_bert(tmp_path_factory.mktemp("bert")), layer=2)


@dataclass
class Script:
    """A viewer that says what it is told to, question by question, and remembers what it was asked."""

    answers: Any  # (image, question) -> answer
    asked: list = field(default_factory=list)

    def ask(self, images, questions):
        self.asked += list(zip(images, questions, strict=True))
        return [self.answers(image, question) for image, question in zip(images, questions, strict=True)]


def picture(colour: str) -> Image.Image:
    return Image.new("RGB", (4, 4), colour)


def drawn(image: Image.Image) -> str:
    return {(255, 0, 0): "a cat", (0, 0, 255): "a dog on a bike"}[image.getpixel((0, 0))]


# ---- alignment ----


def test_the_score_is_the_recall_of_the_prompt_in_the_description(text) -> None:
    viewer = Script(lambda image, question: drawn(image))
    reward = VLMAlignment(viewer=viewer, text=text)
    prompts = ["a cat", "a bear"]
    scores = reward([picture("red"), picture("blue")], prompts, [{}, {}])
    recall = BertScorer(text).score(["a cat", "a dog on a bike"], [f"The image contains {p}" for p in prompts])
    assert [score.value for score in scores] == pytest.approx([match.recall for match in recall], abs=1e-6)
    assert [score.note for score in scores] == ["a cat", "a dog on a bike"]
    assert [question for _, question in viewer.asked] == [QUESTION, QUESTION]
    assert QUESTION == "Answer concisely: what is going on in this image?"


def test_no_description_is_a_missing_score_with_its_reason(text) -> None:
    said = iter(["a cat", Failure("the server is away"), "\x00\x1b", "a dog"])
    reward = VLMAlignment(viewer=Script(lambda *_: next(said)), text=text)
    found = score(reward, [picture("red")] * 4, ["a cat"] * 4, [{}] * 4)
    assert found.valid.tolist() == [True, False, False, True]
    assert found.reasons == {1: "the server is away", 2: "the judge's answer is empty"}
    alone = VLMAlignment(viewer=Script(lambda *_: "a dog"), text=text)([picture("red")], ["a cat"], [{}])
    assert found.values[3] == pytest.approx(alone[0].value, abs=1e-6)  # pairs do not slip past the gaps


def test_a_judge_that_writes_without_end_is_cut(text) -> None:
    reward = VLMAlignment(viewer=Script(lambda *_: "a cat \u202e" * 100_000), text=text)
    answered = reward([picture("red")], ["a cat"], [{}])[0]
    assert len(answered.note) <= 1000
    assert "\u202e" not in answered.note
    assert answered.value <= 1.0


def test_several_questions_give_the_mean_or_the_least(text) -> None:
    said = {"first?": "a cat", "second?": "a dog on a bike"}
    values = {}
    for combine in ("mean", "min"):
        viewer = Script(lambda image, question: said[question])
        reward = VLMAlignment(viewer=viewer, text=text, questions=("first?", "second?"), combine=combine)
        answered = reward([picture("red")], ["a cat"], [{}])[0]
        values[combine] = answered.value
        assert answered.note == "a cat | a dog on a bike"
    single = [match.recall for match in BertScorer(text).score(list(said.values()), ["The image contains a cat"] * 2)]
    assert values == pytest.approx({"mean": sum(single) / 2, "min": min(single)}, abs=1e-6)


def test_rare_words_weigh_more_where_frequencies_are_asked_for(text, tmp_path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na cow\n")
    reward = VLMAlignment(viewer=Script(lambda *_: "a cat"), text=text, frequencies=str(tmp_path / "prompts.txt"))
    documents = ("The image contains a cat", "The image contains a cow")
    expected = BertScorer(text, documents).score(["a cat"], ["The image contains a dog"])[0].recall
    plain = BertScorer(text).score(["a cat"], ["The image contains a dog"])[0].recall
    assert reward([picture("red")], ["a dog"], [{}])[0].value == pytest.approx(expected, abs=1e-6)
    assert not math.isclose(expected, plain, abs_tol=1e-3)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="ask at least one"):
        VLMAlignment(questions=())
    with pytest.raises(ConfigError, match=r"must have \{prompt\} in it"):
        VLMAlignment(statement="The image contains a cat")
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        Veto(share=0)


def test_a_recipe_names_it_with_settings() -> None:
    reward: Any = resolve(
        "vlm_alignment",
        {"model": "some/folder", "veto_text": True, "veto": {"score": 0.0}, "text": {"model": "m", "layer": 3}},
    )
    assert (reward.model, reward.text.layer, reward.veto.score, reward.deterministic) == ("some/folder", 3, 0.0, True)
    served: Any = resolve("vlm_questions", {"model": "judge", "url": "http://127.0.0.1:1/v1", "concurrency": 2})
    assert (served.asked.url, served.asked.model, served.asked.persistence.concurrency) == (served.url, "judge", 2)
    assert not served.deterministic
    with pytest.raises(ConfigError, match="cannot be set in a recipe"):
        resolve("vlm_counting", {"viewer": "me"})


# ---- words ----


def test_numerals_and_number_words_are_one() -> None:
    assert words("Four 4 cats, the 10th? 21 12") == ["four", "four", "cats", "the", "10th", "21", "twelve"]
    assert NUMBERS[12] == "twelve"


@pytest.mark.parametrize(
    ("answer", "wanted", "whole", "inside"),
    [
        ("There are 4 turtles.", "four", True, True),
        ("Four", "four", True, True),
        ("four", "4", True, True),
        ("There are none.", "one", False, True),  # the authors' rule takes it
        ("A caterpillar.", "cat", False, True),
        ("Two cats", "cat", True, True),
        ("14 of them", "four", False, True),
        ("a hot  DOG stand", "hot dog", True, False),
        ("wolves", "wolf", True, False),
        ("I cannot tell", "four", False, False),
        ("anything", "", False, False),
    ],
)
def test_an_answer_is_matched_by_whole_words_or_anywhere(answer, wanted, whole, inside) -> None:
    assert says(answer, wanted) is whole
    assert contains(answer, wanted) is inside


def test_yes_and_no() -> None:
    assert yes_or_no("Yes, there is no doubt.") is True
    assert yes_or_no("No.") is False
    assert yes_or_no("Nothing of the kind; yesterday") is None


# ---- questions ----


def test_counting_asks_the_papers_questions_and_takes_the_mean() -> None:
    said = iter(["There are 6.", "A turtle", "five", "a turtle", "six", "a frog"])
    viewer = Script(lambda *_: next(said))
    known = {"noun": "turtle", "count": 6}
    scores = VLMCounting(viewer=viewer)([picture("red")] * 3, ["six turtles"] * 3, [known] * 3)
    assert [score.value for score in scores] == [1.0, 0.5, 0.5]
    assert [question for _, question in viewer.asked[:2]] == [
        "How many turtles are there in this image?",
        "What animal is in this image?",
    ]
    assert scores[1].note == "How many turtles are there in this image? five | What animal is in this image? a turtle"


def test_the_authors_metadata_and_their_rule() -> None:
    known = {"questions": ["How many cats are there in this image?"], "answers": ["one"]}
    none = Script(lambda *_: "none")
    assert VLMCounting(viewer=none)([picture("red")], ["one cat"], [known])[0].value == 0.0
    assert VLMCounting(viewer=none, match="substring")([picture("red")], ["one cat"], [known])[0].value == 1.0


def test_a_prompt_without_questions_has_no_score() -> None:
    scores = VLMCounting(viewer=Script(lambda *_: "x"))([picture("red")], ["a cat"], [{"noun": "cat"}])
    assert (scores[0].value, scores[0].reason) == (None, "the prompt's metadata names no noun and count")


def test_questions_of_geneval_2() -> None:
    known = {"vqa_list": [["How many cows are in the image?", "three"], ["Are the cows plastic?", "Yes"]]}
    said = {
        "How many cows are in the image? Answer in one word.": "3",
        "Are the cows plastic? Answer in one word.": "no",
    }
    viewer = Script(lambda image, question: said[question])
    images, prompts = [picture("red")], ["three plastic cows"]
    mean = VLMQuestions(viewer=viewer, suffix=" Answer in one word.")
    assert mean(images, prompts, [known])[0].value == 0.5
    whole = VLMQuestions(viewer=viewer, suffix=" Answer in one word.", combine="all")
    assert whole(images, prompts, [known])[0].value == 0.0


def test_neither_yes_nor_no_is_missing_not_wrong() -> None:
    said = iter(["Yes.", "It is a fine picture.", "no", Failure("timed out")])
    viewer = Script(lambda *_: next(said))
    scores = VLMQuestions(viewer=viewer)([picture("red")] * 4, ["a cat"] * 4, [{}] * 4)
    assert [score.value for score in scores] == [1.0, None, 0.0, None]
    assert "neither yes nor no" in scores[1].reason
    assert scores[3].reason.endswith("timed out")
    assert viewer.asked[0][1] == 'Does this image show "a cat"? Answer yes or no.'


@pytest.mark.parametrize("bad", [[["only a question"]], "text", [[1, 2]], []])
def test_a_malformed_list_of_questions_is_missing(bad) -> None:
    scores = VLMQuestions(viewer=Script(lambda *_: "yes"))([picture("red")], ["a cat"], [{"vqa_list": bad}])
    assert scores[0].value is None
    assert "vqa_list" in scores[0].reason


# ---- typographic attacks ----


@dataclass
class Reader:
    """A viewer that reads: it says what is shown and, as LLaVA does, what is written, and cannot tell them apart."""

    shown: dict[int, str]
    written: dict[int, str]

    def ask(self, images, questions):
        return [self._answer(id(image), question) for image, question in zip(images, questions, strict=True)]

    def _answer(self, image: int, question: str) -> str:
        if "written" in question:
            return self.written.get(image, "None.")
        return self.written.get(image) or self.shown[image]


def scene(reader: Reader, shown: str, written: str = "") -> Image.Image:
    """A picture, with words drawn into it."""
    image = Image.new("RGB", (64, 32), "white")
    reader.shown[id(image)] = shown
    if written:
        ImageDraw.Draw(image).text((2, 2), written, fill="black")
        reader.written[id(image)] = written
    return image


def test_writing_the_prompt_beats_drawing_it_and_the_veto_stops_that(text) -> None:
    reader = Reader({}, {})
    honest = scene(reader, "four turtles on sand")
    attack = scene(reader, "a beach", written="six turtles")
    images, prompts = [honest, attack], ["six turtles"] * 2
    known = [{"noun": "turtle", "count": 6}] * 2
    counted = [score.value for score in VLMCounting(viewer=reader)(images, prompts, known)]
    assert counted == [0.5, 1.0]  # the attack wins
    guarded = VLMCounting(viewer=reader, veto_text=True)(images, prompts, known)
    assert [score.value for score in guarded] == [0.5, None]
    assert guarded[1].reason == "the prompt's words are written in the picture"
    assert guarded[1].note.endswith("written: six turtles")
    described = [score.value for score in VLMAlignment(viewer=reader, text=text)(images, prompts, [{}] * 2)]
    assert described[1] > described[0]
    guarded = VLMAlignment(viewer=reader, text=text, veto_text=True, veto=Veto(score=0.0))(images, prompts, [{}] * 2)
    assert [score.value for score in guarded] == [pytest.approx(described[0]), 0.0]


@pytest.mark.parametrize(
    ("prompt", "written", "share"),
    [
        ("six turtles", "sixx tutttles", 1.0),  # loosely, as the paper saw it
        ("six turtles", "6 TURTLE", 1.0),
        ("a dog reading a book", "BOOK", 1 / 3),
        ("a cat", "car", 0.0),
        ('a sign that says "open"', "open", 0.0),  # asked for
        ("a cat", "There is no text in this image.", 0.0),
    ],
)
def test_what_counts_as_written(prompt, written, share) -> None:
    assert share_written(content_words(prompt), written, Veto().alike) == pytest.approx(share)


def test_what_cannot_be_read_is_not_trusted() -> None:
    viewer = Script(lambda image, question: Failure("timed out") if "written" in question else "yes")
    answered = VLMQuestions(viewer=viewer, veto_text=True)([picture("red")], ["a cat"], [{}])[0]
    assert (answered.value, answered.reason) == (None, "what is written in the picture is not known: timed out")


def test_where_there_is_no_score_nobody_is_asked_what_is_written() -> None:
    viewer = Script(lambda *_: Failure("timed out"))
    assert VLMQuestions(viewer=viewer, veto_text=True)([picture("red")], ["a cat"], [{}])[0].value is None
    assert len(viewer.asked) == 1


@pytest.mark.parametrize("nothing", ["none", "None.", "", "No text.", '"none"'])
def test_nothing_written_leaves_the_score(nothing) -> None:
    viewer = Script(lambda image, question: nothing if "written" in question else "yes")
    assert VLMQuestions(viewer=viewer, veto_text=True)([picture("red")], ["a cat"], [{}])[0].value == 1.0


def read_cat(images) -> list[str]:
    return ["CAT"] * len(images)


def test_another_reader_may_read() -> None:
    viewer = Script(lambda image, question: "yes")
    reward = VLMQuestions(viewer=viewer, veto_text=True, veto=Veto(reader="test_judge:read_cat"))
    assert reward([picture("red")], ["a cat"], [{}])[0].value is None
    assert len(viewer.asked) == 1  # the judge is not asked what is written
    with pytest.raises(ConfigError, match="name module:function"):
        Veto(reader="no.such:thing").read([picture("red")])
