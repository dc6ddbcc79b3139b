"""Rewards by question and answer: counting as in Black et al. 2023 (DDPO, arXiv 2305.13301, appendix), questions that
come with the prompt (TIFA, arXiv 2303.11897; GenEval 2, arXiv 2512.16853), and a plain yes or no.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL.Image import Image

from tiller.emoji.words import plural
from tiller.rewards.judge.base import VisionJudge
from tiller.rewards.judge.viewer import Failure, missing
from tiller.rewards.judge.words import NUMBERS, contains, says, yes_or_no
from tiller.types import Score

Pair = tuple[str, str]
"""A question, and the answer that is right."""


@dataclass(frozen=True)
class QuestionJudge(VisionJudge):
    """The share of questions about a picture that are answered right.

    A picture with a question that is not answered, or with a yes-or-no question answered by neither, has no score. The
    note holds all questions and answers.
    """

    match: Literal["word", "substring"] = "word"  # whole words; or anywhere in the answer, as in the authors' code
    combine: Literal["mean", "all"] = "mean"  # the share that is right; or 1 if all are, else 0
    suffix: str = ""  # put behind every question

    @abstractmethod
    def pairs(self, prompt: str, metadata: Mapping[str, Any]) -> list[Pair] | str:
        """The questions to ask about a picture of the prompt, with their answers; or why there are none."""

    def judged(
        self, images: Sequence[Image], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[Score]:
        """N scores in [0, 1]."""
        asked = [self.pairs(prompt, known) for prompt, known in zip(prompts, metadata, strict=True)]
        found = [[] if isinstance(pairs, str) else pairs for pairs in asked]
        answers = iter(
            self.ask(
                [image for image, pairs in zip(images, found, strict=True) for _ in pairs],
                [question + self.suffix for pairs in found for question, _ in pairs],
            )
        )
        return [
            missing(pairs) if isinstance(pairs, str) else self._marked(pairs, [next(answers) for _ in pairs])
            for pairs in asked
        ]

    def _marked(self, pairs: Sequence[Pair], answers: Sequence[str | Failure]) -> Score:
        note = " | ".join(
            f"{question} {answer}"
            for (question, _), answer in zip(pairs, answers, strict=True)
            if isinstance(answer, str)
        )
        right = []
        for (question, wanted), answer in zip(pairs, answers, strict=True):
            mark = answer if isinstance(answer, Failure) else self._right(answer, wanted)
            if isinstance(mark, Failure):
                return missing(f"{question} {mark.reason}", note)
            right.append(mark)
        return Score(float(all(right)) if self.combine == "all" else sum(right) / len(right), note=note)

    def _right(self, answer: str, wanted: str) -> bool | Failure:
        if wanted.strip().lower() in ("yes", "no"):
            said = yes_or_no(answer)
            if said is None:
                return Failure(f"the answer is neither yes nor no ({answer[:60]!r})")
            return said == (wanted.strip().lower() == "yes")
        return says(answer, wanted) if self.match == "word" else contains(answer, wanted)


@dataclass(frozen=True)
class VLMCounting(QuestionJudge):
    """Asks how many of the prompt's noun are in the picture, and what animal is, of prompts such as "six turtles".

    The metadata of a prompt names `noun` and `count`, as the built-in animal_counts do, or the authors' `questions`
    and `answers`. The authors' code looks for the answers anywhere in the judge's words (`match: substring`).
    """

    kind: str = "animal"

    def pairs(self, prompt: str, metadata: Mapping[str, Any]) -> list[Pair] | str:
        """The two questions of a prompt."""
        noun, count = metadata.get("noun"), metadata.get("count")
        if isinstance(noun, str) and isinstance(count, int) and 0 <= count < len(NUMBERS):
            return [
                (f"How many {plural(noun)} are there in this image?", NUMBERS[count]),
                (f"What {self.kind} is in this image?", noun),
            ]
        return listed(metadata) or "the prompt's metadata names no noun and count"


@dataclass(frozen=True)
class VLMQuestions(QuestionJudge):
    """The questions that come with a prompt: `vqa_list` as [[question, answer], ...] in its metadata, or `questions`
    and `answers`; without any, `question` about the prompt itself, to which yes is right.
    """

    question: str = 'Does this image show "{prompt}"? Answer yes or no.'

    def pairs(self, prompt: str, metadata: Mapping[str, Any]) -> list[Pair] | str:
        """The questions of a prompt."""
        if "vqa_list" in metadata or "questions" in metadata:
            return listed(metadata) or "the prompt's vqa_list is no list of [question, answer]"
        return [(self.question.replace("{prompt}", prompt), "yes")]


def listed(metadata: Mapping[str, Any]) -> list[Pair]:
    """The questions and answers in a prompt's metadata; none if they are malformed."""
    given = metadata.get("vqa_list")
    if given is None:
        questions, answers = metadata.get("questions"), metadata.get("answers")
        if not (isinstance(questions, (list, tuple)) and isinstance(answers, (list, tuple))):
            return []
        given = list(zip(questions, answers, strict=True)) if len(questions) == len(answers) else []
    pairs = [tuple(pair) for pair in given] if isinstance(given, (list, tuple)) else []
    whole = all(len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], (str, int)) for pair in pairs)
    return [(question, str(answer)) for question, answer in pairs] if whole else []
