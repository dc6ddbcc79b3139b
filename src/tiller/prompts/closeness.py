"""How close two prompts are, in wording and in meaning.

wording(a, b) = 1 - lev(a, b) / max(|a|, |b|), where a and b are the words in lower case, numerals written out, and lev
is how many of them must be inserted, dropped or replaced (Levenshtein).
meaning(a, b) = min(1, (1 - cos(e(a), e(b))) / apart), where e is the mean of a text encoder's token embeddings.

Both are in [0, 1]: a wording of 1 is the same words, a meaning of 0 the same vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiller.rewards.judge.encoder import TextEncoder
from tiller.rewards.judge.words import words

ARTICLES = ("a", "an", "the")
MEANING_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
"""An encoder trained so that texts of one meaning lie close; its sixth layer is its last."""


def normalised(text: str) -> tuple[str, ...]:
    """The words of a prompt in lower case, without articles and signs; numerals up to 20 written out."""
    return tuple(word for word in words(text) if word not in ARTICLES)


def edit_distance(first: Sequence[object], second: Sequence[object]) -> int:
    """How many entries must be inserted, dropped or replaced to make one sequence the other (Levenshtein 1966)."""
    above = list(range(len(second) + 1))
    for row, entry in enumerate(first, start=1):
        here = [row]
        for column, other in enumerate(second, start=1):
            here.append(min(above[column] + 1, here[-1] + 1, above[column - 1] + (entry != other)))
        above = here
    return above[-1]


def wording(first: str, second: str) -> float:
    """How alike two prompts are in their words, in [0, 1]."""
    one, other = words(first), words(second)
    longest = max(len(one), len(other))
    return 1.0 - edit_distance(one, other) / longest if longest else 1.0


def vectors(encoder: TextEncoder, texts: Sequence[str]) -> Tensor:
    """(N, D) one unit vector per text: the mean of its tokens' embeddings, as sentence encoders are read."""
    means = [tokens.embeddings.mean(0) for tokens in encoder.encode(texts)]
    return torch.nn.functional.normalize(torch.stack(means), dim=-1) if means else torch.empty(0, 0)


def meaning(first: Tensor, second: Tensor, apart: float = 1.0) -> Tensor:
    """How far apart meanings are, in [0, 1], by their unit vectors (..., D).

    Args:
        apart: the cosine distance from which on they have nothing in common. Encoders that put all texts into a
            narrow cone ask for less than 1.
    """
    return ((1.0 - (first * second).sum(-1)) / apart).clamp(0.0, 1.0)


@dataclass(frozen=True)
class Closeness:
    """When two prompts count as the same one: if their words are the same, articles aside, or close enough."""

    wording: float = 0.9  # or more: 1 - Levenshtein distance / length, without articles
    meaning: float = 0.05  # or less: the cosine distance of their vectors, where there is an encoder
    encoder: TextEncoder | None = None


class Known:
    """Prompts that a new one must not be close to."""

    def __init__(self, closeness: Closeness) -> None:
        self.closeness = closeness
        self._texts: list[str] = []
        self._words: list[tuple[str, ...]] = []
        self._exact: dict[tuple[str, ...], int] = {}
        self._vectors: list[Tensor] = []

    def add(self, texts: Sequence[str]) -> None:
        """More prompts to keep away from."""
        for text in texts:
            split = normalised(text)
            self._exact.setdefault(split, len(self._texts))
            self._texts.append(text)
            self._words.append(split)
        if self.closeness.encoder is not None and texts:
            self._vectors.extend(vectors(self.closeness.encoder, texts))

    def closest(self, text: str) -> str | None:
        """A known prompt that this one is close to, if there is one."""
        split = normalised(text)
        if split in self._exact:
            return self._texts[self._exact[split]]
        for known, other in zip(self._texts, self._words, strict=True):
            if self._same_words(split, other):
                return known
        return self._same_meaning(text)

    def _same_words(self, split: tuple[str, ...], other: tuple[str, ...]) -> bool:
        longest = max(len(split), len(other))
        least = self.closeness.wording * longest
        shared = len(set(split) & set(other)) + len(split) - len(set(split))  # at least as many as can be kept
        return shared >= least and longest - edit_distance(split, other) >= least

    def _same_meaning(self, text: str) -> str | None:
        if self.closeness.encoder is None or not self._vectors:
            return None
        distance = 1.0 - torch.stack(self._vectors) @ vectors(self.closeness.encoder, [text])[0]
        nearest = int(distance.argmin())
        return self._texts[nearest] if distance[nearest] <= self.closeness.meaning else None
