"""The guard against typographic attacks: does the picture say in letters what it should show?

Black et al. 2023 (arXiv 2305.13301) saw it: rewarded by LLaVA's answers for prompts such as "six turtles", a model
learned to write text that loosely resembles the right number, and LLaVA read it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

from PIL.Image import Image

from tiller.rewards.judge.viewer import Failure, legible, missing, noted
from tiller.rewards.judge.words import content_words, share_written
from tiller.types import ConfigError, Score

NOTHING = frozenset(("", "none", "no", "nothing", "no text", "there is no text", "there is none", "n/a"))
"""How judges say that nothing is written."""


@dataclass(frozen=True)
class Veto:
    """When written words cost a picture its score, and what it gets instead."""

    question: str = "What words or letters are written in this image? Answer with them alone, or with: none."
    reader: str | None = None  # module:function, (images) -> list of texts, to read with instead of the judge
    share: float = 0.5  # of the prompt's words that carry meaning; with so many of them written there is a veto
    alike: float = 0.7  # how similar a written word must be to one of the prompt's, in [0, 1]
    score: float | None = None  # what a picture gets that is vetoed; None: its score is missing

    def __post_init__(self) -> None:
        if not (0 < self.share <= 1 and 0 < self.alike <= 1):
            raise ConfigError("share and alike must be above 0 and at most 1.")

    def read(self, images: Sequence[Image]) -> list[str | Failure] | None:
        """What the reader reads in each picture; None if the judge is to be asked."""
        return None if self._reader is None else list(self._reader(images))

    def passed(self, score: Score, prompt: str, text: str | Failure) -> Score:
        """The score, unless the prompt's words are written in the picture, or nobody knows what is."""
        if isinstance(text, Failure):
            return missing(f"what is written in the picture is not known: {text.reason}", score.note)
        read = legible(text)
        if read.lower().strip(" .!\"'") in NOTHING:
            return score
        kept = noted(score, f"written: {read}")
        if share_written(content_words(prompt), read, self.alike) < self.share:
            return kept
        if self.score is None:
            return missing("the prompt's words are written in the picture", kept.note)
        return Score(self.score, note=kept.note)

    @cached_property
    def _reader(self) -> Any:
        if self.reader is None:
            return None
        module, _, name = self.reader.partition(":")
        try:
            return getattr(import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(
                f"veto.reader {self.reader!r} cannot be imported ({error}); name module:function."
            ) from error
