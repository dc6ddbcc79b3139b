"""What a picture of the embedded world shows of everything that its prompt leaves open, by the gold judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image

from tiller.emoji.judge import CLASSES, Judge, stated
from tiller.emoji.scenes import parse
from tiller.types import PipelineError

ATTRIBUTES: Mapping[str, str] = {
    "noun": "first",
    "colour": "colour",
    "place": "place",
    "size": "size",
    "count": "count",
}
"""Attribute -> the judge's fact."""

OPEN_PROMPTS = ("", "a cat", "a dog", "a horse", "an apple", "a car")
"""They leave everything open, or everything but the noun."""


def attributes(images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, list[str | None]]:
    """{attribute: N options}, the judge's first choice; None where the prompt states it.

    Raises:
        PipelineError: the pictures are no still pictures.
    """
    if not all(isinstance(image, Image.Image) for image in images):
        raise PipelineError("the embedded world's judge reads still pictures only; choose another reader.")
    facts = Judge.load().facts(images) if images else {}
    said = [stated(parse(prompt)) for prompt in prompts]
    return {
        attribute: [
            None if fact in said[row] else CLASSES[fact][int(facts[fact][row].argmax())] for row in range(len(images))
        ]
        for attribute, fact in ATTRIBUTES.items()
    }
