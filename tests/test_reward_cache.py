"""The cache of scores: what a key is made of, what is asked again, bounds, damage; and the log of every score."""

from __future__ import annotations

import json
import sqlite3
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tiller.rewards import score
from tiller.rewards.cache import Cached, Store, cached, counts, identity_of, picture_hash
from tiller.rewards.mix import Mix, Part
from tiller.run import scores
from tiller.types import RunError, Score, Scores

IMAGES = [Image.new("RGB", (4, 4), (value, 0, 0)) for value in (10, 20, 30)]
PROMPTS, METADATA = ["a", "b", "c"], [{}, {}, {}]


@dataclass(frozen=True)
class Slow:
    """Counts the pictures it is asked about."""

    gain: float = 1.0
    deterministic = True
    asked = []  # noqa: RUF012

    def __call__(self, images: list, prompts: list, metadata: list) -> list[Any]:
        self.asked.extend(image.getpixel((0, 0))[0] for image in images)
        return [Score(self.gain * image.getpixel((0, 0))[0], note="seen") for image in images]


@pytest.fixture
def slow() -> Slow:
    Slow.asked.clear()
    return Slow()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache.sqlite")


def test_what_is_known_is_not_asked_again_also_after_a_restart(slow: Slow, tmp_path: Path) -> None:
    for attempt in range(2):
        reward = cached(slow, slow, Store(tmp_path / "cache.sqlite"))
        found = score(reward, IMAGES[: 2 + attempt], PROMPTS[: 2 + attempt], METADATA[: 2 + attempt])
        assert found.values.tolist() == [10, 20, 30][: 2 + attempt]
        assert found.notes[0] == "seen"
        assert counts(reward) == {"cache/hits": 2.0 * attempt, "cache/misses": 2.0 - attempt}
    assert Slow.asked == [10, 20, 30]


@pytest.mark.parametrize("other", ["prompt", "metadata", "pixels", "mode", "size", "settings"])
def test_another_picture_prompt_metadata_or_setting_is_another_key(slow: Slow, store: Store, other: str) -> None:
    score(cached(slow, slow, store), IMAGES[:1], ["a"], [{}])
    image, changed = IMAGES[0], slow
    if other == "pixels":
        image = image.copy()
        image.putpixel((3, 3), (10, 0, 1))
    image = {"mode": image.convert("RGBA"), "size": image.resize((2, 8))}.get(other, image)
    changed = Slow(2.0) if other == "settings" else slow
    prompt, metadata = "z" if other == "prompt" else "a", {"n": 1} if other == "metadata" else {}
    found = score(cached(changed, changed, store), [image], [prompt], [metadata])
    assert found.values.tolist() == [20 if other == "settings" else 10]
    assert Slow.asked == [10, 10]


def test_a_missing_score_is_asked_for_again_and_parts_come_back(store: Store) -> None:
    answers = iter([[1.0, None], [2.0]])

    def judge(images: list, prompts: list, metadata: list) -> dict:
        return {"x": next(answers), "y": [5.0] * len(images)}

    judge.deterministic = True  # type: ignore[attr-defined]
    reward = cached(judge, judge, store)
    first = score(reward, IMAGES[:2], PROMPTS[:2], METADATA[:2])
    np.testing.assert_array_equal(first.values, [6, np.nan])
    assert first.reasons == {1: "x: None"}
    again = score(reward, IMAGES[:2], PROMPTS[:2], METADATA[:2])
    assert again.values.tolist() == [6, 7]
    assert again.components["x"].tolist() == [1, 2]
    assert again.reasons == {}


def test_only_what_says_it_is_deterministic_is_cached_and_no_comparison(store: Store) -> None:
    def plain(images: list, prompts: list, metadata: list) -> list:
        return []

    assert cached(plain, plain, store) is plain
    plain.deterministic = True  # type: ignore[attr-defined]
    assert isinstance(cached(plain, plain, store), Cached)
    assert cached(plain, plain, None) is plain
    plain.groupwise = True  # type: ignore[attr-defined]
    assert cached(plain, plain, store) is plain


def test_identity_holds_settings_source_and_what_the_reward_adds(tmp_path: Path) -> None:
    from tiller.rewards import resolve

    file = tmp_path / "mine.py"
    file.write_text("def f(images, prompts, metadata): return [1.0]\n")
    before = identity_of(resolve(f"{file}:f"))
    file.write_text("def f(images, prompts, metadata): return [2.0]\n")
    assert identity_of(resolve(f"{file}:f")) != before
    assert identity_of(Slow()) == identity_of(Slow()) != identity_of(Slow(3.0))


def test_videos_and_arrays_have_a_hash_too() -> None:
    array = np.zeros((2, 2, 3), np.uint8)
    assert picture_hash(array) == picture_hash(array.copy()) != picture_hash(array.reshape(2, 6))
    assert picture_hash(IMAGES[:2]) not in (picture_hash(IMAGES[0]), picture_hash(IMAGES[1::-1]))


def test_the_oldest_go_beyond_the_limit(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache.sqlite", limit=3)
    for number in range(5):
        store.put({str(number): "x"})
    assert store.get([str(number) for number in range(5)]) == [None, None, "x", "x", "x"]


@pytest.mark.parametrize("damage", ["text", "cut", "folder"])
def test_a_file_that_cannot_be_used_costs_questions_and_nothing_else(slow: Slow, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "cache.sqlite"
    score(cached(slow, slow, Store(path)), IMAGES, PROMPTS, METADATA)
    if damage == "text":
        path.write_bytes(b"no database at all, but a long enough text" * 50)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:4096])
    else:
        path.unlink()
        path.mkdir()
    found = score(cached(slow, slow, Store(path)), IMAGES, PROMPTS, METADATA)
    assert found.values.tolist() == [10, 20, 30]


def test_several_threads_share_a_store(store: Store) -> None:
    def work(number: int) -> None:
        for turn in range(5):
            store.put({f"{number}-{turn}": "x"})
            store.get([f"{number}-{turn}"])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.count() == (20, 0)


def test_the_file_is_a_database_of_texts_without_secrets(
    slow: Slow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "hf_SECRET_of_mine")

    def judge(images: list, prompts: list, metadata: list) -> list:
        return [Score(1.0, note="asked with hf_SECRET_of_mine")]

    judge.deterministic = True  # type: ignore[attr-defined]
    score(cached(judge, judge, Store(tmp_path / "c.sqlite")), IMAGES[:1], ["a"], [{}])
    (text,) = sqlite3.connect(tmp_path / "c.sqlite").execute("SELECT text FROM scores").fetchone()
    assert json.loads(text) == [1.0, {}, "asked with [MY_TOKEN]"]
    assert b"hf_SECRET" not in (tmp_path / "c.sqlite").read_bytes()


def test_the_hits_of_all_parts_are_counted_once(slow: Slow, store: Store) -> None:
    mixed = Mix((Part("a", cached(slow, slow, store)), Part("b", cached(Slow(2.0), Slow(2.0), store))))
    score(mixed, IMAGES[:1], ["a"], [{}])
    score(mixed, IMAGES[:2], PROMPTS[:2], METADATA[:2])
    assert counts(mixed) == {"cache/hits": 2.0, "cache/misses": 4.0}
    assert counts(len) == counts(None) == {}


# ---- the log ----

FOUND = Scores(
    np.array([1.5, np.nan]), {"a": np.array([1.5, 2.0]), "b": np.array([0.0, np.nan])}, {1: "b: away"}, {0: "fine"}
)


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]


def test_every_score_is_a_line_with_its_parts_reason_and_note(tmp_path: Path) -> None:
    scores.append(tmp_path, 3, ["a cat", "a dog"], [16, 17], FOUND)
    cat = {"epoch": 3, "prompt": "a cat", "sample": 16, "total": 1.5, "components": {"a": 1.5, "b": 0.0}}
    dog = {"epoch": 3, "prompt": "a dog", "sample": 17, "total": None, "components": {"a": 2.0, "b": None}}
    assert logged(tmp_path) == [cat | {"note": "fine"}, dog | {"reason": "b: away"}]


def test_a_full_file_is_put_aside_and_a_resumed_run_cuts_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "LARGEST", 100)
    for epoch in range(1, 7):
        scores.append(tmp_path, epoch, ["a", "b"], [0, 1], FOUND)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["scores-000003.jsonl", "scores-000004.jsonl", "scores-000005.jsonl", "scores.jsonl"]
    scores.cut(tmp_path, 4)
    assert sorted(path.name for path in tmp_path.iterdir() if path.stat().st_size) == names[:2]
    scores.append(tmp_path, 5, ["a"], [0], Scores(np.array([1.0])))
    assert logged(tmp_path) == [{"epoch": 5, "prompt": "a", "sample": 0, "total": 1.0}]
    scores.cut(tmp_path, None)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.jsonl"]
    assert logged(tmp_path) == []


def test_a_torn_line_goes_and_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    scores.append(tmp_path, 1, ["a"], [0], Scores(np.array([1.0])))
    before = (tmp_path / "scores.jsonl").read_bytes()
    (tmp_path / "scores.jsonl").write_bytes(before + b'{"epoch": 1, "pro')
    scores.cut(tmp_path, 1)
    assert (tmp_path / "scores.jsonl").read_bytes() == before
    with pytest.raises(RunError, match="cannot write"):
        scores.append(tmp_path / "nowhere", 2, ["a"], [0], Scores(np.array([1.0])))
