"""What can be said of a scene, truly and falsely, for models that learn to read pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tiller.emoji import scenes
from tiller.emoji.judge import CLASSES, stated, truth
from tiller.emoji.scenes import Facts, Scene
from tiller.emoji.words import ACTIVITIES, ANIMALS, COLOURS, NOUNS, PLACES, RELATIONS, SIZES, UNSEEN_ACTIVITIES

EVERY_ACTIVITY = ACTIVITIES + UNSEEN_ACTIVITIES
KINDS: dict[str, float] = {
    "alone": 0.12,
    "colour": 0.12,
    "activity": 0.30,
    "count": 0.26,
    "size": 0.06,
    "place": 0.06,
    "relation": 0.08,
}
"""Share of each kind of scene that the models which read pictures learn from."""

CHOICES: dict[str, tuple[object, ...]] = {
    "noun": NOUNS,
    "other": NOUNS,
    "count": (1, 2, 3, 4),
    "activity": EVERY_ACTIVITY,
    "relation": RELATIONS,
    "size": SIZES,
    "place": PLACES,
    "colour": COLOURS,
}


def any_scene(rng: np.random.Generator) -> Scene:
    """A random scene in the shares of `KINDS`; its activity is any, also one unseen by the diffusion models."""
    return scenes.sample(rng, str(rng.choice(list(KINDS), p=list(KINDS.values()))), EVERY_ACTIVITY)


def said(scene: Scene, rng: np.random.Generator, colour: float = 0.35, numeral: float = 0.2) -> Scene:
    """The same picture under another caption: with these chances it names the background, and says "one" for "a"."""
    return replace(
        scene,
        colour_said=bool(rng.random() < colour),
        numeral=scene.size is None and bool(rng.random() < numeral),
    )


def wrong(scene: Scene, rng: np.random.Generator) -> Scene:
    """A scene whose caption differs from this one's in one stated fact, and is false of this one's picture."""
    facts = ["noun", *(fact for fact in ("activity", "other", "relation", "size", "place") if getattr(scene, fact))]
    if scene.colour_said:
        facts.append("colour")
    if len(facts) == 1 + scene.colour_said:  # nothing but a noun, so that there may be several
        facts.append("count")
    fact = str(rng.choice(facts))
    choices = ANIMALS if fact == "noun" and scene.activity else CHOICES[fact]
    taken = (scene.noun, scene.other, getattr(scene, fact))
    left = [choice for choice in choices if choice not in taken]
    return replace(scene, **{fact: left[int(rng.integers(len(left)))]})  # type: ignore[arg-type]


def statement(scene: Scene) -> dict[str, int]:
    """{fact: class} for what the scene's caption says: `stated(parse(caption(scene)))` without reading it."""
    colour = scene.colour if scene.colour_said else None
    return stated(
        Facts(
            scene.noun,
            scene.count,
            scene.activity,
            scene.other,
            scene.relation,
            scene.size,
            scene.place,
            colour,
        )
    )


def contradictions(pictures: Sequence[Scene], captions: Sequence[Scene]) -> Tensor:
    """(N, M) bool: caption j states something that is not so in picture i. Where it is False, j may be said of i."""
    seen, claimed = _table([truth(s) for s in pictures]), _table([statement(s) for s in captions])  # (N, F), (M, F)
    known = (seen[:, None] >= 0) & (claimed[None] >= 0)
    return (known & (seen[:, None] != claimed[None])).any(-1)


def _table(rows: Sequence[dict[str, int]]) -> Tensor:
    return torch.tensor([[row.get(fact, -1) for fact in CLASSES] for row in rows])
