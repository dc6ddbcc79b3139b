"""Whether a picture shows the text that its prompt asks for, as a reader reads it: the text task of Flow-GRPO."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from PIL import Image

from tiller.rewards.scorers.pixels import rgb
from tiller.rewards.scorers.reader import HOLE, Reader
from tiller.types import ConfigError, Score, TillerError

_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')


@dataclass(frozen=True)
class OCR:
    """1 - min(d, len) / len, with d the edits between what is read and what is asked for, len the latter's length.

    Both without spaces and in lower case; d is 0 where the one contains the other. What is asked for is the metadata's
    `text`, or the first thing in quotes in the prompt. Where there is neither, or the reader fails, a score is missing.
    The reader is any image-text-to-text model that is asked `question`, or, with an empty question, one that only
    reads: TrOCR (one line of text), GOT-OCR.
    """

    deterministic: ClassVar[bool] = True

    model: str = "Qwen/Qwen2-VL-2B-Instruct"
    revision: str | None = None  # by default the one that tiller pins
    question: str = "Write down all text in this picture, exactly as it is written, and nothing else."
    column: str = "text"  # of the metadata
    length: int = 64  # tokens read at most
    layout: str = ""  # the text around the question, for a model without a chat template
    device: str = "auto"
    dtype: str = "auto"  # bfloat16 on a GPU, float32 on the CPU
    batch_size: int = 8  # pictures per forward

    def __post_init__(self) -> None:
        if self.layout and HOLE not in self.layout:
            raise ConfigError(f"ocr: the layout {self.layout!r} has no {HOLE}, which stands for the question.")

    @cached_property
    def reader(self) -> Reader:
        """The model, loaded at its first use."""
        return Reader("ocr", self.model, self.revision, self.layout, self.device, self.dtype, self.batch_size)

    def __call__(
        self, images: Sequence[Any], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[Score]:
        """N scores; what was read is the note."""
        pictures = rgb(images, "ocr")
        targets = [known.get(self.column) or quoted(prompt) for known, prompt in zip(metadata, prompts, strict=True)]
        wanted = [index for index, target in enumerate(targets) if target]
        read = dict(zip(wanted, self._read([pictures[index] for index in wanted]), strict=True))
        return [
            _score(str(target), read[index])
            if target
            else Score(None, f"the prompt quotes no text, and the metadata has no {self.column!r}")
            for index, target in enumerate(targets)
        ]

    def _read(self, pictures: list[Image.Image]) -> list[str | Exception]:
        """The text in each picture; where a batch fails, each picture of it on its own."""
        try:
            return list(self._texts(pictures))
        except TillerError:
            raise
        except Exception as error:
            if len(pictures) == 1:
                return [error]
            return [read for picture in pictures for read in self._read([picture])]

    def _texts(self, pictures: list[Image.Image]) -> list[str]:
        if not self.question:
            return self.reader.readings(pictures, self.length)
        return self.reader.answers(pictures, [self.question] * len(pictures), self.length)


def _score(target: str, read: str | Exception) -> Score:
    if isinstance(read, Exception):
        return Score(None, f"the reader failed: {type(read).__name__}: {read}")
    if not plain(target):
        return Score(None, "the text asked for is empty")
    return Score(accuracy(target, read), note=read)


def quoted(prompt: str) -> str:
    """The first thing in double quotes; empty if there is none."""
    match = _QUOTED.search(prompt)
    return (match[1] or match[2]) if match else ""


def plain(text: str) -> str:
    """Without any spaces, in lower case."""
    return "".join(text.split()).lower()


def accuracy(target: str, text: str) -> float:
    """1 - min(d, len) / len between 0 and 1; d is the Levenshtein distance, or 0 where the text contains the target.

    Raises:
        ValueError: the target has no letters.
    """
    wanted, seen = plain(target), plain(text)
    if not wanted:
        raise ValueError("the text asked for is empty")
    distance = 0 if wanted in seen else min(levenshtein(wanted, seen), len(wanted))
    return 1 - distance / len(wanted)


def levenshtein(first: str, second: str) -> int:
    """The fewest letters to insert, delete or replace on the way from one text to the other."""
    row = list(range(len(second) + 1))
    for i, letter in enumerate(first, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(second, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (letter != other))
    return row[-1]
