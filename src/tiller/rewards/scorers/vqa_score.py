"""How sure a model that sees is that a picture shows its prompt: VQAScore (Lin et al. 2024, 2404.01291)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from tiller.rewards.scorers.pixels import rgb
from tiller.rewards.scorers.reader import HOLE, Reader
from tiller.types import ConfigError

OVER = ("vocabulary", "answers")


@dataclass(frozen=True)
class VQAScore:
    """P("Yes") after a question about the picture, by any image-text-to-text model of transformers.

    Over the vocabulary it is the geometric mean of the probabilities of the answer's tokens. Over the answers it is
    that mean over the sum of it and the other answer's: with one token each, the softmax of their two logits.
    """

    deterministic: ClassVar[bool] = True

    model: str = "Qwen/Qwen2-VL-2B-Instruct"
    revision: str | None = None
    question: str = 'Does this figure show "{}"? Please answer Yes or No.'  # {} is the prompt
    answer: str = "Yes"
    other: str = "No"  # needed over the answers alone
    over: str = "vocabulary"  # or answers: what the probabilities add up to 1 over
    layout: str = ""  # the text around the question, for a model without a chat template, such as "<image>\n{}"
    device: str = "auto"
    dtype: str = "auto"  # bfloat16 on a GPU, float32 on the CPU
    batch_size: int = 8  # pictures per forward

    def __post_init__(self) -> None:
        if self.over not in OVER:
            raise ConfigError(f"vqa_score: over is {self.over!r}; name {' or '.join(OVER)}.")
        if HOLE not in self.question:
            raise ConfigError(f"vqa_score: the question {self.question!r} has no {HOLE}, which stands for the prompt.")
        if self.layout and HOLE not in self.layout:
            raise ConfigError(f"vqa_score: the layout {self.layout!r} has no {HOLE}, which stands for the question.")

    @cached_property
    def reader(self) -> Reader:
        """The model, loaded at its first use."""
        return Reader("vqa_score", self.model, self.revision, self.layout, self.device, self.dtype, self.batch_size)

    def __call__(
        self, images: Sequence[Any], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        """N probabilities."""
        questions = [self.question.replace(HOLE, prompt) for prompt in prompts]
        answers = [self.answer] if self.over == "vocabulary" else [self.answer, self.other]
        logs = self.reader.log_probs(rgb(images, "vqa_score"), questions, answers)  # (N, answers)
        if self.over == "answers":
            logs = logs.log_softmax(1)
        return logs[:, 0].exp().tolist()
