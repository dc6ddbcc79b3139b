"""Questions about pictures of the embedded world, with their answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tiller.emoji import scenes, wording
from tiller.emoji.scenes import Scene
from tiller.emoji.words import ANIMALS, NOUNS, NUMBERS, plural

CONCISE = (
    "Answer concisely: what is going on in this image?",
    "What is happening in this image?",
    "What is in this image?",
    "Describe this image.",
    "Describe this image in one sentence.",
)
"""Answered by what is in the picture, without its background."""

DETAILED = "Describe this image in detail."
"""Answered by all of it, the background too."""

TRUE_OR_FALSE = (
    'Does this figure show "{}"? Please answer Yes or No.',
    'Does this image show "{}"? Answer Yes or No.',
    "Does this image show {}? Please answer Yes or No.",
    "Is this a picture of {}? Answer Yes or No.",
)
HOW_MANY = "How many {} are there in this image?"  # answered in words
HOW_MANY_DIGITS = "How many {} are there in this image? Answer with a number."
WHAT_ANIMAL = "What animal is in this image?"
WHAT_DOING = "What is the {} doing?"
WHAT_BACKGROUND = ("What colour is the background?", "What color is the background?")

KINDS: dict[str, float] = {
    "concise": 0.20,
    "detailed": 0.14,
    "true or false": 0.50,
    "count": 0.08,
    "animal": 0.03,
    "doing": 0.02,
    "background": 0.03,
}
"""Share of each kind of question in training; one that does not fit a scene becomes `concise`."""


def turn(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A random question about the scene's picture, and its answer."""
    kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
    if kind == "detailed":
        return DETAILED, detailed(scene)
    if kind == "true or false":
        caption, true = claim(scene, rng)
        return str(rng.choice(TRUE_OR_FALSE)).format(caption), "Yes" if true else "No"
    if kind == "count":
        return how_many(scene, rng)
    if kind == "animal" and scene.noun in ANIMALS and scene.other is None:
        return WHAT_ANIMAL, scenes.caption(Scene(scene.noun))
    if kind == "doing" and scene.activity:
        return WHAT_DOING.format(scene.noun), scene.activity
    if kind == "background":
        return str(rng.choice(WHAT_BACKGROUND)), scene.colour
    return str(rng.choice(CONCISE)), concise(scene)


def concise(scene: Scene) -> str:
    """`three mice`, `a cat washing dishes`: the scene's caption without its background."""
    return scenes.caption(replace(scene, colour_said=False, numeral=scene.count > 1))


def detailed(scene: Scene) -> str:
    """`three mice on a blue background`: all that a caption can say."""
    return scenes.caption(replace(scene, colour_said=True, numeral=scene.count > 1))


def claim(scene: Scene, rng: np.random.Generator) -> tuple[str, bool]:
    """A caption and whether it is true of the scene, with equal chances.

    Of the false ones about two thirds differ from the true one in a single fact; the others are those of any scene.
    """
    told = wording.said(scene, rng)
    if rng.random() < 0.5:
        return scenes.caption(told), True
    other = wording.said(wording.any_scene(rng), rng)
    if rng.random() < 0.6 or not wording.contradictions([scene], [other]).item():
        other = wording.wrong(told, rng)
    return scenes.caption(other), False


def how_many(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A question for a number, in a sixth of cases of something that is not there."""
    noun, count = scene.noun, scene.count
    if rng.random() < 1 / 6:
        absent = [n for n in NOUNS if n not in (scene.noun, scene.other, *(scene.activity or "").split())]
        noun, count = absent[int(rng.integers(len(absent)))], 0
    if rng.random() < 0.5:
        return HOW_MANY_DIGITS.format(plural(noun)), str(count)
    return HOW_MANY.format(plural(noun)), ("zero", *NUMBERS)[count]
