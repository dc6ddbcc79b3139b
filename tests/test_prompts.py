"""Prompt sources, the paper's sets and their splits, and the draw of an epoch."""

from __future__ import annotations

from collections import Counter

import pytest

from tiller.emoji.words import ANIMALS, OBJECTS
from tiller.prompts import SETS, draw, held_out, load
from tiller.types import ConfigError, Prompt

# ---- sources ----


def test_a_list_of_texts_and_prompts() -> None:
    cat = Prompt("a cat", {"n": 1})
    assert load([cat, "a dog"]) == [cat, Prompt("a dog")]


def test_a_text_file_skips_blank_lines_and_comments(tmp_path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("﻿# animals\r\n\r\na cat\r\n   a dog  \n  # no\nnaïve #1\n".encode())
    assert [prompt.text for prompt in load(str(file))] == ["a cat", "a dog", "naïve #1"]


def test_a_jsonl_file_keeps_the_rest_as_metadata(tmp_path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a cat", "count": 1}\n\n{"tags": ["x"], "prompt": "a\u2028dog"}\n')
    assert load(file) == [Prompt("a cat", {"count": 1}), Prompt("a\u2028dog", {"tags": ["x"]})]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.txt", "\n# only a comment\n", "has no prompts"),
        ("p.jsonl", "", "has no prompts"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "p.jsonl:2 is not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"text": "b"}\n', "p.jsonl:3 has no prompt"),
        ("p.jsonl", '"a cat"', "p.jsonl:1 has no prompt"),
        ("p.jsonl", '{"prompt": 3}', "p.jsonl:1 has no prompt"),
        ("p.jsonl", '{"prompt": "  "}', "p.jsonl:1 has no prompt"),
        ("p.csv", "a cat", "neither .txt"),
        ("p.txt", b"\xff\xfe\x00", "is not UTF-8"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name: str, content, says: str) -> None:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        load(str(file))
    assert says in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("missing.txt", "there is no prompt file missing.txt"),
        ("folder/missing", "there is no prompt file"),
        (".", "are a folder"),
        ("animal_count", "did you mean animal_counts?"),
        ("zzz", "animals, animal_activities"),
        ([], "is empty"),
        (["a cat", " "], "prompt 1 of the list"),
        ([3], "prompt 0 of the list"),
    ],
)
def test_nothing_there(spec, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(spec)
    assert says in str(caught.value)


# ---- the paper's sets ----


def texts(prompts: list[Prompt]) -> set[str]:
    return {prompt.text for prompt in prompts}


def test_the_words_of_each_set() -> None:
    assert {"a cat", "a horse"} < texts(load("animals"))
    assert "a cat playing chess" in texts(load("animal_activities"))
    assert {"one wolf", "three wolves", "two mice", "four sheep", "two foxes"} < texts(load("animal_counts"))
    assert {"an ant", "an ant riding a bike"} < texts(load("animals_all")) | texts(load("animal_activities_all"))
    assert len(load("animals_all")) == 45
    assert len(load("animal_activities_all")) == 45 * 3
    assert len(load("animal_counts_all")) == 45 * 4
    assert len(load("animals")) == 36


@pytest.mark.parametrize("name", SETS)
def test_nothing_held_out_is_trained_on(name: str) -> None:
    training, splits = load(name), held_out(name)
    assert len(texts(training)) == len(training)
    assert texts(splits.pop("trained")) < texts(training)
    nouns = {prompt.metadata["noun"] for prompt in training}
    activities = {prompt.metadata.get("activity") for prompt in training}
    assert nouns <= set(ANIMALS)
    for split, prompts in splits.items():
        assert prompts
        assert not texts(prompts) & texts(training)
        seen = {"unseen_animals": nouns, "unseen_objects": nouns}.get(split)
        if seen is not None:
            assert not {prompt.metadata["noun"] for prompt in prompts} & seen
        else:
            assert split in ("unseen_activities", "both_unseen")
            assert split != "both_unseen" or not {prompt.metadata["noun"] for prompt in prompts} & nouns
            assert not {prompt.metadata["activity"] for prompt in prompts} & activities


def test_which_splits_a_set_has() -> None:
    assert list(held_out("animals")) == ["trained", "unseen_animals", "unseen_objects"]
    assert list(held_out("animal_activities")) == [
        "trained",
        "unseen_animals",
        "unseen_objects",
        "unseen_activities",
        "both_unseen",
    ]
    assert list(held_out("animals_all")) == ["trained", "unseen_objects"]
    assert {prompt.metadata["noun"] for prompt in held_out("animals")["unseen_objects"]} == set(OBJECTS)
    trained = {prompt.metadata["noun"] for prompt in load("animals")}
    unseen = {prompt.metadata["noun"] for prompt in held_out("animals")["unseen_animals"]}
    assert trained | unseen == set(ANIMALS)


def test_metadata_says_what_the_text_says() -> None:
    (three,) = [prompt for prompt in load("animal_counts") if prompt.text == "three wolves"]
    assert three.metadata == {"noun": "wolf", "count": 3}
    (chess,) = [prompt for prompt in load("animal_activities") if prompt.text == "a cat playing chess"]
    assert chess.metadata == {"noun": "cat", "count": 1, "activity": "playing chess"}


def test_an_unknown_set() -> None:
    with pytest.raises(ConfigError, match=r"did you mean animals\?"):
        held_out("animal")


# ---- the draw ----


def test_draw_is_a_function_of_seed_and_epoch() -> None:
    assert draw(range(36), 3, 7, 64, 8) == draw(range(36), 3, 7, 64, 8)
    assert draw(range(36), 3, 7, 64, 8) != draw(range(36), 4, 7, 64, 8)
    assert draw(range(36), 3, 7, 64, 8) != draw(range(36), 3, 8, 64, 8)


def test_draw_does_not_change_with_a_release() -> None:
    """A run that is resumed with a newer numpy must draw what it would have drawn."""
    assert draw(range(5), 0, 0, 6, 2) == [(2, 0), (2, 1), (4, 0), (4, 1), (3, 0), (3, 1)]


def test_groups_stand_together() -> None:
    pairs = draw(range(10), 0, 0, 24, 4)
    for start in range(0, 24, 4):
        assert len({prompt for prompt, _ in pairs[start : start + 4]}) == 1
        assert len({sample for _, sample in pairs[start : start + 4]}) == 4


def test_prompts_are_dealt_without_replacement_across_epochs() -> None:
    """10 prompts, 4 per epoch: after 5 epochs each was drawn exactly twice, whatever the epochs' borders."""
    drawn = [pair for epoch in range(5) for pair in draw(range(10), 1, epoch, 8, 2)]
    assert Counter(prompt for prompt, _ in drawn) == dict.fromkeys(range(10), 4)
    assert Counter(prompt for prompt, _ in drawn[:20]) == dict.fromkeys(range(10), 2)


def test_a_prompt_and_sample_never_come_twice() -> None:
    """Noise is keyed by (seed, prompt, sample): a pair that came again would be the same noise again."""
    drawn = [pair for epoch in range(40) for pair in draw(range(3), 5, epoch, 12, 2)]
    assert len(set(drawn)) == len(drawn)
    for prompt in range(3):
        samples = sorted(sample for drawn_prompt, sample in drawn if drawn_prompt == prompt)
        assert samples == list(range(len(samples)))


@pytest.mark.parametrize(("count", "group", "near"), [(60, 8, 64), (57, 8, 56), (3, 8, 8), (9, 4, 8), (11, 4, 12)])
def test_a_count_that_makes_no_whole_groups_is_told_the_nearest(count: int, group: int, near: int) -> None:
    with pytest.raises(ConfigError, match=f"nearest that does is {near}\\."):
        draw(range(5), 0, 0, count, group)


@pytest.mark.parametrize(("prompts", "count", "group"), [([], 8, 8), (["a"], 0, 1), (["a"], 8, 0)])
def test_draws_of_nothing_are_refused(prompts, count: int, group: int) -> None:
    with pytest.raises(ConfigError):
        draw(prompts, 0, 0, count, group)
