"""Who looks at a picture and answers a question about it, and what is done to an answer before it is believed."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from PIL.Image import Image

from tiller.rewards.serving.persistence import Failure
from tiller.types import Score

LONGEST = 1000  # characters of an answer that are read


INVISIBLE = ("Cf", "Cs", "Co", "Cn")
"""Categories of Unicode: signs of format such as a reversal of the direction, halves of signs, private, unassigned."""


class Viewer(Protocol):
    """Anything with an `ask`: `LocalViewer`, `tiller.rewards.serving.chat.ChatModel`, or your own."""

    def ask(self, images: Sequence[Image], questions: Sequence[str]) -> list[str | Failure]:
        """One answer per question, in order: N pictures, N questions."""
        ...


def legible(answer: str, longest: int = LONGEST) -> str:
    """An answer on one line, without control and other invisible characters, of at most `longest` characters.

    What a judge writes goes into logs, reports and terminals, and a picture may hold text that steers it.
    """
    kinds = [(letter, unicodedata.category(letter)) for letter in answer[: 4 * longest]]
    spaced = (" " if kind == "Cc" else letter for letter, kind in kinds if kind not in INVISIBLE)
    return " ".join("".join(spaced).split())[:longest].rstrip()


def checked(answer: object, longest: int = LONGEST) -> str | Failure:
    """A legible answer, or why it is none: no text, or nothing that could be a word."""
    if isinstance(answer, Failure):
        return Failure(legible(answer.reason, 200) or "the judge gave no answer")
    if not isinstance(answer, str):
        return Failure(f"the judge's answer is no text but a {type(answer).__name__}")
    words = legible(answer, longest)
    if not any(letter.isalnum() for letter in words):
        return Failure("the judge's answer is empty" if not words else "the judge's answer has no word in it")
    return words


def missing(reason: str, note: str = "") -> Score:
    """No score, and why; what the judge wrote is kept."""
    return Score(None, reason=reason, note=note)


def noted(score: Score, more: str) -> Score:
    """The score with more in its note."""
    return replace(score, note=f"{score.note} | {more}" if score.note else more)
