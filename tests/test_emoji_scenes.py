"""The embedded world: words, captions and what they state, pictures."""

import dataclasses

import numpy as np
import pytest

from tiller.emoji import scenes
from tiller.emoji.scenes import Facts, FontError, Scene, caption, draw, parse, sample
from tiller.emoji.words import (
    ACTIVITIES,
    ANIMALS,
    NOUNS,
    OBJECTS,
    PROPS,
    UNSEEN_ACTIVITIES,
    article,
    plural,
)

needs_font = pytest.mark.skipif(not scenes.FONT.exists(), reason="the emoji font is not installed")


def test_words_are_those_of_the_paper_and_distinct():
    assert len(ANIMALS) == 45
    assert len(set(NOUNS)) == len(NOUNS) == len(ANIMALS) + len(OBJECTS)
    assert len({plural(n) for n in NOUNS}) == len(NOUNS)
    assert set(PROPS) == set(ACTIVITIES) | set(UNSEEN_ACTIVITIES)
    assert ACTIVITIES == ("washing dishes", "playing chess", "riding a bike")


@pytest.mark.parametrize(
    ("noun", "many"),
    [
        ("cat", "cats"),
        ("fox", "foxes"),
        ("mouse", "mice"),
        ("goose", "geese"),
        ("wolf", "wolves"),
        ("fly", "flies"),
        ("butterfly", "butterflies"),
        ("monkey", "monkeys"),
        ("donkey", "donkeys"),
        ("turkey", "turkeys"),
        ("sheep", "sheep"),
        ("deer", "deer"),
        ("fish", "fish"),
        ("bus", "buses"),
        ("key", "keys"),
        ("lioness", "lionesses"),
    ],
)
def test_plurals(noun, many):
    assert plural(noun) == many


def test_articles():
    assert [article(w) for w in ("ant", "apple", "umbrella", "cat", "small ant")] == [
        "an",
        "an",
        "an",
        "a",
        "a",
    ]


@pytest.mark.parametrize(
    ("scene", "text"),
    [
        (Scene("ant"), "an ant"),
        (Scene("cat", activity="washing dishes"), "a cat washing dishes"),
        (Scene("wolf", count=3, numeral=True), "three wolves"),
        (Scene("cat", numeral=True), "one cat"),
        (Scene("ant", size="small"), "a small ant"),
        (Scene("cat", colour="blue", colour_said=True), "a cat on a blue background"),
        (Scene("cat", place="left"), "a cat on the left"),
        (Scene("cat", place="top"), "a cat at the top"),
        (Scene("cat", other="ant", relation="left of"), "a cat left of an ant"),
        (
            Scene("fly", activity="riding a bike", colour="red", colour_said=True),
            "a fly riding a bike on a red background",
        ),
    ],
)
def test_captions(scene, text):
    assert caption(scene) == text


def test_a_caption_states_exactly_what_its_scene_says():
    rng = np.random.default_rng(1)
    for _ in range(2000):
        scene = sample(rng, activities=ACTIVITIES + UNSEEN_ACTIVITIES)
        expected = Facts(
            scene.noun,
            scene.count,
            scene.activity,
            scene.other,
            scene.relation,
            scene.size,
            scene.place,
            scene.colour if scene.colour_said else None,
        )
        assert parse(caption(scene)) == expected, caption(scene)


def test_parse_reads_prompts_that_are_not_captions():
    assert parse("A photo of Two Mice, please!") == Facts("mouse", 2)
    assert parse("cats") == Facts("cat")  # how many is left open
    assert parse("a unicorn playing chess") == Facts(activity="playing chess")
    assert parse("a unicorn") == Facts()
    assert parse("a cat holding an umbrella") == Facts("cat", 1, "holding an umbrella")  # no second noun
    assert parse("a whale above a bus").relation == "above"


def test_sampling_is_a_function_of_the_seed_and_reaches_every_kind():
    first = [sample(np.random.default_rng(7)) for _ in range(2)]
    assert first[0] == first[1]
    rng = np.random.default_rng(0)
    drawn = [sample(rng) for _ in range(1000)]
    assert {s.count for s in drawn} == {1, 2, 3, 4}
    assert {s.activity for s in drawn} == {None, *ACTIVITIES}  # never an unseen one
    assert {s.noun for s in drawn} == set(NOUNS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        drawn[0].noun = "cat"


@needs_font
def test_drawing_is_a_function_of_the_scene():
    scene = Scene("cat", count=2, jitter=5)
    assert draw(scene).tobytes() == draw(scene).tobytes()
    assert draw(scene).tobytes() != draw(dataclasses.replace(scene, jitter=6)).tobytes()
    assert draw(scene, size=32).size == (32, 32)


@needs_font
def test_every_glyph_exists_and_no_two_are_alike():
    pictures = {draw(Scene("cat", jitter=1)).tobytes()}
    for noun in NOUNS:
        pictures.add(draw(Scene(noun, jitter=1)).tobytes())
    assert len(pictures) == len(NOUNS)


@needs_font
@pytest.mark.parametrize(
    ("place", "axis", "sign"), [("left", 1, -1), ("right", 1, 1), ("top", 0, -1), ("bottom", 0, 1)]
)
def test_place_is_where_the_pixels_are(place, axis, sign):
    for jitter in range(20):
        picture = np.asarray(draw(Scene("bear", place=place, colour="white", jitter=jitter))).astype(int)
        marked = np.argwhere(np.abs(picture - picture[0, 0]).sum(-1) > 60)
        assert sign * (marked[:, axis].mean() - 31.5) > 8


@needs_font
def test_no_mark_leaves_the_picture():
    rng = np.random.default_rng(2)
    for _ in range(300):
        scene = sample(rng)
        if scene.size == "large":
            continue
        picture = np.asarray(draw(scene)).astype(int)
        border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        share = (np.abs(border - np.median(border, 0)).sum(-1) > 60).mean()
        assert share < 0.08, caption(scene)


def test_a_missing_font_names_its_package(tmp_path):
    with pytest.raises(FontError, match="fonts-noto-color-emoji"):
        draw(Scene("cat"), font=tmp_path / "none.ttf")
