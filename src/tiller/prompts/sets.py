"""The prompt sets of Black et al. 2023 (DDPO, arXiv 2305.13301) and what each holds out.

A set trains on 36 of the paper's 45 animals, so that nine are left that no update has seen; with `_all` in
its name it trains on all 45, as the paper does, and holds out objects and activities only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches

from tiller.emoji.words import ACTIVITIES, ANIMALS, NUMBERS, OBJECTS, UNSEEN_ACTIVITIES, article, plural
from tiller.types import ConfigError, Prompt

UNSEEN_ANIMALS: tuple[str, ...] = (
    *("zebra", "deer", "tiger", "ant", "shark"),
    *("rat", "duck", "llama", "hedgehog"),
)
"""Held out of training."""

TRAINED_SAMPLE: tuple[str, ...] = (
    *("horse", "cow", "cat", "butterfly", "dolphin"),
    *("mouse", "chicken", "camel", "squirrel"),
)
"""Trained animals of about the same kinds, to compare the unseen ones with."""

TRAINED_ANIMALS: tuple[str, ...] = tuple(animal for animal in ANIMALS if animal not in UNSEEN_ANIMALS)


def _alone(nouns: Iterable[str]) -> list[Prompt]:
    """`a(n) [noun]`."""
    return [Prompt(f"{article(noun)} {noun}", {"noun": noun, "count": 1}) for noun in nouns]


def _active(nouns: Iterable[str], activities: Iterable[str] = ACTIVITIES) -> list[Prompt]:
    """`a(n) [noun] [activity]`."""
    doings = tuple(activities)
    return [
        Prompt(f"{article(noun)} {noun} {activity}", {"noun": noun, "count": 1, "activity": activity})
        for noun in nouns
        for activity in doings
    ]


def _counted(nouns: Iterable[str]) -> list[Prompt]:
    """`[n] [nouns]`, one to four."""
    return [
        Prompt(f"{number} {plural(noun) if count > 1 else noun}", {"noun": noun, "count": count})
        for noun in nouns
        for count, number in enumerate(NUMBERS, start=1)
    ]


_FORMS: dict[str, Callable[[Iterable[str]], list[Prompt]]] = {
    "animals": _alone,
    "animal_activities": _active,
    "animal_counts": _counted,
}

SETS: tuple[str, ...] = (*_FORMS, *(f"{name}_all" for name in _FORMS))
"""The names that `prompts:` and `held_out:` of a recipe take."""


def training(name: str) -> list[Prompt]:
    """The prompts of a set that are trained on; the same list in the same order every time."""
    form, everything = _form(name)
    return form(ANIMALS if everything else TRAINED_ANIMALS)


def held_out(name: str) -> dict[str, list[Prompt]]:
    """What a set is evaluated on, by how far it is from training.

    `trained` is a sample of the training prompts; `unseen_animals`, `unseen_objects`, `unseen_activities`
    and `both_unseen` (animals and activities) were not trained on. An `_all` set has no unseen animals,
    and only sets with activities have unseen ones.
    """
    form, everything = _form(name)
    splits = {"trained": form(TRAINED_SAMPLE)}
    if not everything:
        splits["unseen_animals"] = form(UNSEEN_ANIMALS)
    splits["unseen_objects"] = form(OBJECTS)
    if form is _active:
        splits["unseen_activities"] = _active(TRAINED_SAMPLE, UNSEEN_ACTIVITIES)
        if not everything:
            splits["both_unseen"] = _active(UNSEEN_ANIMALS, UNSEEN_ACTIVITIES)
    return splits


def _form(name: str) -> tuple[Callable[[Iterable[str]], list[Prompt]], bool]:
    """How a set words its prompts, and whether it trains on all 45 animals."""
    if name not in SETS:
        close = get_close_matches(name, SETS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the sets are {', '.join(SETS)}."
        raise ConfigError(f"there is no prompt set {name!r}; {hint}")
    base = name.removesuffix("_all")
    return _FORMS[base], base != name
