"""The alignment reward of Black et al. 2023 (DDPO, arXiv 2305.13301, section 5): a vision-language model describes the
picture, and BERTScore tells how much of the prompt its words recall.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from PIL.Image import Image

from tiller.prompts import load
from tiller.rewards.judge.base import VisionJudge
from tiller.rewards.judge.encoder import BertScorer, TextEncoder
from tiller.rewards.judge.viewer import Failure, missing
from tiller.types import ConfigError, Score

QUESTION = "Answer concisely: what is going on in this image?"
STATEMENT = "The image contains {prompt}"


@dataclass(frozen=True)
class VLMAlignment(VisionJudge):
    """BERTScore recall of "The image contains PROMPT" against the judge's description, in [-1, 1], mostly .4 to 1.

    With several questions, the mean (or the least) over the descriptions. The descriptions are the score's note. A
    picture that the judge does not describe has no score.
    """

    questions: tuple[str, ...] = (QUESTION,)
    combine: Literal["mean", "min"] = "mean"
    statement: str = STATEMENT
    part: Literal["recall", "precision", "f1"] = "recall"
    text: TextEncoder = field(default_factory=TextEncoder)  # whose embeddings are compared
    frequencies: str | None = None  # prompts, as a recipe names them, whose statements weigh rare words higher
    baseline: tuple[float, float, float] | None = None  # precision, recall and F1 of unrelated texts, to rescale by

    def __post_init__(self) -> None:
        if not self.questions:
            raise ConfigError("questions are empty; ask at least one.")
        if "{prompt}" not in self.statement:
            raise ConfigError(f"statement is {self.statement!r}; it must have {{prompt}} in it.")
        if self.baseline is not None and not all(value < 1 for value in self.baseline):
            raise ConfigError("the baseline's numbers must be below 1.")

    def judged(
        self, images: Sequence[Image], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[Score]:
        """N scores."""
        count = len(self.questions)
        answers = self.ask([image for image in images for _ in range(count)], list(self.questions) * len(images))
        wanted = [self._stated(prompt) for prompt in prompts for _ in range(count)]
        known = [index for index, answer in enumerate(answers) if not isinstance(answer, Failure)]
        matches = self._scorer.score([str(answers[index]) for index in known], [wanted[index] for index in known])
        values = {index: getattr(match, self.part) for index, match in zip(known, matches, strict=True)}
        return [
            self._combined(answers[first : first + count], [values.get(first + at) for at in range(count)])
            for first in range(0, len(answers), count)
        ]

    def _combined(self, answers: Sequence[str | Failure], values: Sequence[float | None]) -> Score:
        note = " | ".join(answer for answer in answers if isinstance(answer, str))
        for answer in answers:
            if isinstance(answer, Failure):
                return missing(answer.reason, note)
        numbers = [value for value in values if value is not None and math.isfinite(value)]
        if len(numbers) < len(values):
            return missing("the description cannot be compared with the prompt", note)
        value = min(numbers) if self.combine == "min" else sum(numbers) / len(numbers)
        return Score(min(value, 1.0), note=note)  # rounding may go beyond 1

    def _stated(self, prompt: str) -> str:
        return self.statement.replace("{prompt}", prompt)

    @cached_property
    def _scorer(self) -> BertScorer:
        documents = () if self.frequencies is None else tuple(self._stated(p.text) for p in load(self.frequencies))
        return BertScorer(self.text, documents, self.baseline)
