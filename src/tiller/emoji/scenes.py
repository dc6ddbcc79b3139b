"""The embedded world: scenes of emoji, their captions, their pictures, and what a caption states.

A `Scene` fixes a picture to the pixel; its caption states some of it and leaves the rest open. Glyphs come from the
Noto colour emoji font (a bitmap font; Debian package `fonts-noto-color-emoji`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tiller.emoji.words import (
    ACTIVITIES,
    ANIMALS,
    COLOURS,
    NOUNS,
    NUMBERS,
    PLACES,
    PROPS,
    RELATIONS,
    SIZES,
    article,
    plural,
)
from tiller.types import TillerError

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
GLYPHS: dict[str, str] = dict(
    zip(
        (*NOUNS, "dishes", "chess", "bike"),
        "🐱🐶🐴🐵🐰🦓🕷🐦🐑🦌🐮🐐🦁🐯🐻🦝🦊🐺🦎🪲🐜🦋🐟🦈🐳🐬🐿🐭🐀🐍🐢🐸🐔🦆🪿🐝🐷🦃🪰🦙🐪🦇🦍🦔🦘"
        "🍎🍌🍕🎂☕🚗🚌⛵🚀🪑⏰☂🎸🥁🎺📘⚽🎈📷🔑🎩🌻🌳🍄🧽♟🚲",
        strict=True,
    )
)
"""Which character draws which noun or prop."""

RGB: dict[str, tuple[int, int, int]] = {
    "white": (244, 244, 244),
    "grey": (140, 144, 150),
    "red": (214, 72, 72),
    "yellow": (250, 214, 80),
    "green": (110, 190, 110),
    "blue": (90, 150, 230),
    "purple": (150, 100, 200),
    "pink": (250, 170, 200),
}
"""The background colours, 0-255; a scene's own is within 8 of it."""

KINDS: dict[str, float] = {
    "alone": 0.17,
    "colour": 0.20,
    "activity": 0.23,
    "count": 0.27,
    "size": 0.03,
    "place": 0.04,
    "relation": 0.06,
}
"""Share of each kind of caption in training."""


class FontError(TillerError):
    """The emoji font is missing or lacks a glyph."""


@dataclass(frozen=True)
class Scene:
    """One picture: what is in it, and (`numeral`, `colour_said`) how much of it the caption says."""

    noun: str
    count: int = 1  # 1-4; more than 1 excludes activity, other, size and place
    activity: str | None = None
    other: str | None = None  # the second noun of a relation: "a cat left of a dog"
    relation: str | None = None
    size: str | None = None  # small, large; None is in between
    place: str | None = None  # left, right, top, bottom; None is the middle
    colour: str = "white"  # of the background
    colour_said: bool = False
    numeral: bool = False  # "one cat" for "a cat"
    jitter: int = 0  # seed of what no caption states: shifts, exact size, shade of the background


@dataclass(frozen=True)
class Facts:
    """What a caption states; None is left open."""

    noun: str | None = None
    count: int | None = None
    activity: str | None = None
    other: str | None = None
    relation: str | None = None
    size: str | None = None
    place: str | None = None
    colour: str | None = None


def sample(rng: np.random.Generator, kind: str | None = None, activities: tuple[str, ...] = ACTIVITIES) -> Scene:
    """A random scene, of one kind of `KINDS` or of all in those shares."""
    kind = kind or str(rng.choice(list(KINDS), p=list(KINDS.values())))
    noun = str(rng.choice(ANIMALS if kind == "activity" else NOUNS))
    facts: dict[str, object] = {"noun": noun, "colour": str(rng.choice(COLOURS))}
    facts["jitter"] = int(rng.integers(2**31))
    facts["colour_said"] = kind == "colour" or (kind in ("activity", "count") and rng.random() < 0.25)
    if kind == "activity":
        facts["activity"] = str(rng.choice(activities))
    elif kind == "count":
        facts["count"] = int(rng.choice(4, p=(0.1, 0.3, 0.3, 0.3))) + 1
        facts["numeral"] = True
    elif kind == "size":
        facts["size"] = str(rng.choice(SIZES))
    elif kind == "place":
        facts["place"] = str(rng.choice(PLACES))
    elif kind == "relation":
        facts["other"] = str(rng.choice([n for n in NOUNS if n != noun]))
        facts["relation"] = str(rng.choice(RELATIONS))
    return Scene(**facts)  # type: ignore[arg-type]


def caption(scene: Scene) -> str:
    """`a cat washing dishes`, `three mice on a blue background`, `a small ant`, `a cat left of a dog` ..."""
    if scene.numeral or scene.count > 1:
        text = f"{NUMBERS[scene.count - 1]} {plural(scene.noun) if scene.count > 1 else scene.noun}"
    else:
        words = f"{scene.size} {scene.noun}" if scene.size else scene.noun
        text = f"{article(words)} {words}"
    if scene.activity:
        text += f" {scene.activity}"
    if scene.relation and scene.other:
        text += f" {scene.relation} {article(scene.other)} {scene.other}"
    if scene.place:
        text += f" at the {scene.place}" if scene.place in ("top", "bottom") else f" on the {scene.place}"
    if scene.colour_said:
        text += f" on {article(scene.colour)} {scene.colour} background"
    return text


_SINGULAR = {**{plural(noun): noun for noun in NOUNS}, **{noun: noun for noun in NOUNS}}


def parse(text: str) -> Facts:
    """The facts a caption states; words it does not know are passed over (`Facts()` if it knows none)."""
    words = re.findall(r"[a-z]+", text.lower())
    line = " ".join(words)
    activity = next((a for a in PROPS if re.search(rf"\b{a}\b", line)), None)
    if activity:
        line = re.sub(rf"\b{activity}\b", "", line)
    colour = re.search(rf"\b({'|'.join(COLOURS)})\b(?= background)", line)
    nouns = re.findall(rf"\b({'|'.join(_SINGULAR)})\b", line)
    if not nouns:
        return Facts(activity=activity, colour=colour[1] if colour else None)
    number = re.search(rf"\b(an?|{'|'.join(NUMBERS)})\b(?: \w+)?? {nouns[0]}\b", line)
    relation = re.search(rf"\b({'|'.join(RELATIONS)})\b", line) if len(nouns) > 1 else None
    size = re.search(rf"\b({'|'.join(SIZES)}) {nouns[0]}\b", line)
    place = re.search(rf"\b(?:at|on) the ({'|'.join(PLACES)})\b", line)
    return Facts(
        noun=_SINGULAR[nouns[0]],
        count=(NUMBERS.index(number[1]) + 1 if number[1] in NUMBERS else 1) if number else None,
        activity=activity,
        other=_SINGULAR[nouns[1]] if len(nouns) > 1 else None,
        relation=relation[1] if relation else None,
        size=size[1] if size else None,
        place=place[1] if place else None,
        colour=colour[1] if colour else None,
    )


def draw(scene: Scene, size: int = 64, font: str | Path | None = None) -> Image.Image:
    """The picture of a scene, (size, size) RGB."""
    rng = np.random.default_rng(scene.jitter)
    shade = np.clip(np.array(RGB[scene.colour]) + rng.integers(-8, 9, 3), 0, 255)
    picture = Image.new("RGB", (size, size), tuple(int(v) for v in shade))
    common = rng.integers(-2, 3, 2)
    for glyph, x, y, side in _layout(scene, rng):
        pixels = max(1, round(side * size / 64))
        mark = _glyph(GLYPHS[glyph], pixels, str(font or FONT))
        corner = (np.array([x, y]) + common + rng.integers(-1, 2, 2)) * size / 64 - pixels / 2
        picture.paste(mark, (round(corner[0]), round(corner[1])), mark)
    return picture


def _layout(scene: Scene, rng: np.random.Generator) -> list[tuple[str, float, float, float]]:
    """(glyph, centre x, centre y, side) of each mark, in 64ths of the picture."""
    grow = int(rng.integers(-1, 2))
    noun = scene.noun
    if scene.activity:
        prop = PROPS[scene.activity]
        if scene.activity.split()[0] in ("riding", "driving"):
            return [(prop, 32, 47, 28 + grow), (noun, 32, 18, 30 + grow)]
        return [(noun, 22, 28, 36 + grow), (prop, 49, 46, 26 + grow)]
    if scene.other and scene.relation:
        places = {"left of": (17, 32), "right of": (47, 32), "above": (32, 17), "below": (32, 47)}
        x, y = places[scene.relation]
        return [(noun, x, y, 27 + grow), (scene.other, 64 - x, 64 - y, 27 + grow)]
    spots = {
        1: [(32, 32)],
        2: [(17, 32), (47, 32)],
        3: [(32, 17), (17, 47), (47, 47)],
        4: [(17, 17), (47, 17), (17, 47), (47, 47)],
    }[scene.count]
    if scene.count > 1:
        return [(noun, x, y, 26 + grow) for x, y in spots]
    if scene.place:
        x, y = {"left": (17, 32), "right": (47, 32), "top": (32, 17), "bottom": (32, 47)}[scene.place]
        return [(noun, x, y, 28 + grow)]
    side = {"small": 20, None: 40, "large": 56}[scene.size] + grow * (2 if scene.size is None else 1)
    return [(noun, 32, 32, side)]


@cache
def _font(path: str) -> ImageFont.FreeTypeFont:
    """The emoji font at 109, the one size it has."""
    try:
        return ImageFont.truetype(path, 109)
    except OSError as error:
        raise FontError(
            f"the emoji font {path} cannot be read; install the Debian package fonts-noto-color-emoji "
            "or give the path of NotoColorEmoji.ttf"
        ) from error


@cache
def _glyph(character: str, side: int, path: str) -> Image.Image:
    """One glyph, cropped, centred in a square of `side` pixels, RGBA."""
    raw = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(raw).text((8, 8), character, font=_font(path), embedded_color=True)
    box = raw.getbbox()
    if box is None:
        raise FontError(f"the emoji font {path} has no glyph for {character}; install a newer NotoColorEmoji.ttf")
    mark = raw.crop(box)
    edge = max(mark.size)
    square = Image.new("RGBA", (edge, edge), (0, 0, 0, 0))
    square.paste(mark, ((edge - mark.width) // 2, (edge - mark.height) // 2))
    return square.resize((side, side), Image.Resampling.LANCZOS)
