"""Rewards: the JPEG numbers, the contract at the door, names, and the background thread."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import CancelledError
from dataclasses import is_dataclass
from functools import partial
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from tiller.rewards import Background, describe, jpeg_compressibility, jpeg_incompressibility, resolve, score
from tiller.rewards.resolve import BUILT_IN, find
from tiller.types import ConfigError, RewardError, Score, Scores

PROMPTS = ["a cat", "a dog", "a horse"]
IMAGES = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
METADATA: list[dict] = [{}, {}, {}]


def scored(answer, weights=None) -> Scores:
    """What the contract makes of a reward that gives this answer for three pictures."""

    def judge(images, prompts, metadata):
        return answer

    return score(judge, IMAGES, PROMPTS, METADATA, weights)


# ---- JPEG ----


def test_jpeg_counts_the_bytes_of_quality_95_in_thousands() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=95)
    expected = len(buffer.getvalue()) / 1000
    assert jpeg_incompressibility([image], ["x"], [{}]).tolist() == [expected]
    assert jpeg_compressibility([image], ["x"], [{}]).tolist() == [-expected]
    assert expected > 200  # noise at this quality takes more than 6 bits a pixel: not 4:2:0 at 75, not in KiB


def test_jpeg_prefers_plain_pictures_and_takes_any_mode() -> None:
    plain = Image.new("RGBA", (64, 64), (10, 20, 30, 255))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8), "L")
    values = jpeg_compressibility([plain, noise], ["a", "b"], [{}, {}])
    assert values[0] > values[1]
    assert (values < 0).all()


# ---- what the contract accepts ----


@pytest.mark.parametrize(
    "answer",
    [
        [1, 2.5, -3],
        (1, 2.5, -3),
        np.array([1, 2.5, -3], dtype=np.float32),
        torch.tensor([1, 2.5, -3], dtype=torch.bfloat16),
        torch.tensor([1, 2.5, -3], requires_grad=True),
        [np.float16(1), torch.tensor(2.5), -3],
        np.array([1, 2.5, -3], dtype=object),
    ],
)
def test_numbers_of_any_kind_become_float64(answer) -> None:
    scores = scored(answer)
    assert scores.values.dtype == np.float64
    assert scores.values.tolist() == [1.0, 2.5, -3.0]
    assert scores.reasons == {}


@pytest.mark.parametrize(
    ("missing", "reason"),
    [(None, "None"), (float("nan"), "NaN"), (float("inf"), "inf"), (float("-inf"), "-inf"), (10**400, "inf")],
)
def test_missing_is_nan_with_a_reason_and_never_zero(missing, reason) -> None:
    scores = scored([0.5, missing, 0.7])
    assert scores.valid.tolist() == [True, False, True]
    assert np.isnan(scores.values[1])
    assert scores.reasons == {1: reason}


def test_masked_entries_and_tensor_nans_are_missing() -> None:
    assert scored(np.ma.array([1.0, 2.0, 3.0], mask=[0, 1, 0])).reasons == {1: "None"}
    assert scored(torch.tensor([1.0, float("inf"), 3.0])).reasons == {1: "inf"}


def test_named_scores_add_up_and_are_kept_for_the_log() -> None:
    scores = scored({"clip": [1, 2, 3], "size": [10, None, 30]})
    np.testing.assert_array_equal(scores.values, [11, np.nan, 33])
    np.testing.assert_array_equal(scores.components["clip"], [1, 2, 3])
    np.testing.assert_array_equal(scores.components["size"], [10, np.nan, 30])
    assert scores.reasons == {1: "size: None"}


def test_weights_scale_each_name_and_zero_only_logs() -> None:
    scores = scored({"clip": [1, 2, 3], "size": [10, None, 30]}, weights={"clip": 2.0, "size": 0.0})
    assert scores.values.tolist() == [2, 4, 6]
    assert scores.reasons == {}
    assert np.isnan(scores.components["size"][1])
    with pytest.raises(RewardError, match=r"clip, size but the weights name clip, sise"):
        scored({"clip": [1, 2, 3], "size": [1, 2, 3]}, weights={"clip": 1, "sise": 1})
    with pytest.raises(RewardError, match="nothing to weigh"):
        scored([1, 2, 3], weights={"clip": 1})


def test_a_score_object_stands_for_its_number_and_says_why_it_is_missing() -> None:
    scores = scored([Score(0.5, note="sure"), Score(None, reason="server 503"), Score(np.float32(2), reason="ignored")])
    np.testing.assert_array_equal(scores.values, [0.5, np.nan, 2.0])
    assert scores.reasons == {1: "server 503"}
    assert scores.notes == {0: "sure"}
    assert scored([Score(float("nan")), Score(float("inf"), "too big"), None]).reasons == {
        0: "NaN",
        1: "too big",
        2: "None",
    }
    named = scored({"a": [Score(1, note="n"), 2, 3], "b": [0, Score(None, "away"), 0]})
    assert (named.notes, named.reasons) == ({0: "a: n"}, {1: "b: away"})


@pytest.mark.parametrize(
    ("value", "says"), [(True, "a truth value"), ("0.5", "text ('0.5')"), ([1.0], "a list"), (Score(1), "a Score")]
)
def test_what_a_score_object_holds_is_checked_like_any_entry(value, says) -> None:
    with pytest.raises(RewardError, match=r"reward judge returned .* for image 1 \('a dog'\); return"):
        scored([1, Score(value), 3])
    with pytest.raises(RewardError) as caught:
        scored([1, Score(value), 3])
    assert says in str(caught.value)


def test_a_missing_score_leaves_the_advantages_of_others_as_if_the_picture_were_absent() -> None:
    from tiller.advantages import group

    with_it = group(scored([1.0, Score(None, "away"), 4.0]).values, ["a", "a", "a"])
    without = group(np.array([1.0, 4.0]), ["a", "a"])
    np.testing.assert_array_equal(with_it[[0, 2]], without)
    assert np.isnan(with_it[1])


def test_async_rewards_work_with_and_without_a_running_loop() -> None:
    async def judge(images, prompts, metadata):
        await asyncio.sleep(0)
        return [len(prompt) for prompt in prompts]

    assert score(judge, IMAGES, PROMPTS, METADATA).values.tolist() == [5, 5, 7]

    async def notebook():
        return score(judge, IMAGES, PROMPTS, METADATA)

    assert asyncio.run(notebook()).values.tolist() == [5, 5, 7]


def test_the_reward_gets_what_it_asks_for_and_cannot_change_the_callers_lists() -> None:
    prompts, metadata = list(PROMPTS), [{"n": 1}, {"n": 2}, {"n": 3}]

    def judge(images, prompts, metadata):
        assert images == IMAGES
        prompts.clear()
        return [entry["n"] for entry in metadata]

    assert score(judge, IMAGES, prompts, metadata).values.tolist() == [1, 2, 3]
    assert prompts == PROMPTS


def test_no_pictures_no_call() -> None:
    assert score(lambda *_: pytest.fail("called"), [], [], []).values.shape == (0,)


# ---- what the contract refuses ----


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ([1, 2], "returned 2 score(s) for 3 image(s); return one per image"),
        ([1, 2, 3, 4], "returned 4 score(s) for 3 image(s)"),
        ([], "returned 0 score(s)"),
        (["good", 2, 3], "returned text ('good') for image 0 ('a cat')"),
        ("good", "returned text ('good')"),
        ([1, True, 3], "returned a truth value (True) for image 1 ('a dog'); return 1.0 or 0.0"),
        (np.array([True, False, True]), "a truth value"),
        (torch.tensor([True, False, True]), "a truth value"),
        ([1, 2, 3j], "returned a complex number (3j) for image 2"),
        (torch.tensor([1j, 2, 3]), "a complex number"),
        (np.ones((3, 1)), "returned a 3x1 list of lists"),
        (torch.ones(1, 3), "returned a 1x3 list of lists"),
        ([[1], [2], [3]], "list of lists"),
        ([np.ones(1), np.ones(1), np.ones(1)], "list of lists"),
        (None, "returned None"),
        (1.0, "returned a float (1.0)"),
        (np.array(1.0), "returned a ndarray"),
        ({1, 2, 3}, "returned a set"),
        ((x for x in (1, 2, 3)), "returned a generator"),
        ({}, "a mapping without names"),
        ({1: [1, 2, 3]}, "a mapping without names"),
        ({"clip": [1, 2]}, "reward judge[clip] returned 2 score(s)"),
    ],
)
def test_anything_else_is_an_error_that_names_function_value_and_cure(answer, says) -> None:
    with pytest.raises(RewardError) as caught:
        scored(answer)
    message = str(caught.value)
    assert says in message
    assert message.startswith("reward judge")
    assert "return" in message.partition(";")[2]


def test_a_failing_reward_is_named_with_prompt_line_and_cause() -> None:
    def judge(images, prompts, metadata):
        raise KeyError("animal")

    with pytest.raises(RewardError, match=r"reward judge failed .* 'a cat', 'a dog', 'a horse': KeyError") as caught:
        score(judge, IMAGES, PROMPTS, METADATA)
    assert isinstance(caught.value.__cause__, KeyError)
    assert "(test_rewards.py:" in str(caught.value)
    with pytest.raises(RewardError, match="reward judge failed"):
        score(partial(judge), IMAGES, PROMPTS, METADATA)


def test_a_failing_async_reward_tells_its_line_too() -> None:
    async def judge(images, prompts, metadata):
        await asyncio.sleep(0)
        return 1 / 0

    with pytest.raises(RewardError, match=r"ZeroDivisionError: .* \(test_rewards\.py:\d+\)"):
        score(judge, IMAGES, PROMPTS, METADATA)


def test_ctrl_c_is_not_a_failed_reward() -> None:
    def judge(images, prompts, metadata):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(judge, IMAGES, PROMPTS, METADATA)


def test_unequal_inputs_are_refused() -> None:
    with pytest.raises(RewardError, match="3 images, 2 prompts"):
        score(jpeg_compressibility, IMAGES, PROMPTS[:2], METADATA)


# ---- names ----


def test_built_in_names() -> None:
    assert resolve("jpeg_compressibility") is jpeg_compressibility
    assert resolve("tiller.rewards.jpeg:jpeg_incompressibility") is jpeg_incompressibility


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_name_leads_to_a_function_or_to_a_class_of_them(name: str) -> None:
    found = find(name)
    assert callable(found)
    assert not isinstance(found, type) or (is_dataclass(found) and "__call__" in dir(found))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("jpeg_compresibility", "did you mean jpeg_compressibility?"),
        ("xyz", "name one of jpeg_compressibility"),
        ("tiller.rewards.jpeg:jpeg_incompresibility", "did you mean tiller.rewards.jpeg:jpeg_incompressibility?"),
        ("tiller.rewards.nowhere:f", "no module 'tiller.rewards.nowhere'"),
        ("nowhere_at_all.sub:f", "no module 'nowhere_at_all'"),
        ("nowhere.py:f", "there is no file nowhere.py"),
        ("json:JSONDecoder", "is not a function but a class"),
        ("json:__version__", "is not a function but a str"),
        ("json:loads", "a reward takes (images, prompts, metadata)"),
        (":f", "is unknown"),
        ("json:", "is unknown"),
    ],
)
def test_wrong_names_are_told_what_to_do(spec: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(spec)
    assert says in str(caught.value)
    assert repr(spec) in str(caught.value)


def test_a_function_in_a_file(tmp_path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Judge:\n"
        "    k: float = 2.0\n"
        "    def __call__(self, images, prompts, metadata):\n"
        "        return [self.k * len(p) for p in prompts]\n"
        "judge = Judge()\n"
        "def one_argument(images): ...\n"
    )
    assert score(resolve(f"{file}:judge"), IMAGES, PROMPTS, METADATA).values.tolist() == [10, 10, 14]
    with pytest.raises(ConfigError, match=r"did you mean .*mine\.py:judge\?"):
        resolve(f"{file}:jugde")
    with pytest.raises(ConfigError, match=r"takes \(images\)"):
        resolve(f"{file}:one_argument")


def test_two_files_of_one_name_do_not_meet(tmp_path) -> None:
    found = []
    for value in (1, 2):
        (tmp_path / str(value)).mkdir()
        file = tmp_path / str(value) / "reward.py"
        file.write_text(f"def f(images, prompts, metadata): return [{value}] * len(images)\n")
        found.append(resolve(f"{file}:f"))
    assert [score(f, IMAGES, PROMPTS, METADATA).values[0] for f in found] == [1, 2]


@pytest.mark.parametrize(
    ("source", "says"), [("import not_installed_xyz", "not_installed_xyz"), ("x = (", "SyntaxError")]
)
def test_a_file_that_does_not_load_says_why(tmp_path, source: str, says: str) -> None:
    (tmp_path / "broken.py").write_text(source)
    with pytest.raises(ConfigError, match=says):
        resolve(f"{tmp_path / 'broken.py'}:f")


def test_a_module_that_lacks_a_dependency_is_not_called_absent(tmp_path, monkeypatch) -> None:
    (tmp_path / "needs_more.py").write_text("import not_installed_xyz\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="it needs the module 'not_installed_xyz'"):
        resolve("needs_more:f")


# ---- background ----


def test_background_scores_in_order_off_the_calling_thread() -> None:
    seen = []

    def judge(images, prompts, metadata):
        seen.append((prompts[0], threading.current_thread() is threading.main_thread()))
        return [len(seen)] * len(images)

    with Background(judge) as background:
        pending = [background.submit(IMAGES[:1], [prompt], [{}]) for prompt in PROMPTS]
        assert [future.result(timeout=10).values[0] for future in pending] == [1, 2, 3]
    assert seen == [(prompt, False) for prompt in PROMPTS]


def test_submit_does_not_wait_and_takes_a_copy() -> None:
    release = threading.Event()

    def judge(images, prompts, metadata):
        assert release.wait(10)
        return [len(prompt) for prompt in prompts]

    with Background(judge) as background:
        prompts = list(PROMPTS)
        future = background.submit(IMAGES, prompts, METADATA)
        assert not future.done()
        prompts.clear()
        release.set()
        assert future.result(timeout=10).values.tolist() == [5, 5, 7]


def test_one_failing_call_does_not_harm_the_next() -> None:
    async def judge(images, prompts, metadata):
        if prompts[0] == "a cat":
            raise OSError("server away")
        return [1.0]

    with Background(judge) as background:
        bad, good = (background.submit(IMAGES[:1], [prompt], [{}]) for prompt in ("a cat", "a dog"))
        with pytest.raises(RewardError, match="server away"):
            bad.result(timeout=10)
        assert good.result(timeout=10).values.tolist() == [1.0]


def test_closing_without_waiting_cancels_what_is_queued_and_does_not_hang() -> None:
    started, release = threading.Event(), threading.Event()

    def judge(images, prompts, metadata):
        started.set()
        assert release.wait(10)
        return [1.0]

    background = Background(judge)
    running = background.submit(IMAGES[:1], ["a cat"], [{}])
    assert started.wait(10)
    queued = background.submit(IMAGES[:1], ["a dog"], [{}])
    background.close(wait=False)
    with pytest.raises(CancelledError):
        queued.result(timeout=0)
    release.set()
    assert running.result(timeout=10).values.tolist() == [1.0]
    with pytest.raises(RewardError, match="closed"):
        background.submit(IMAGES[:1], ["a cat"], [{}])


# ---- is there anything to learn ----


@pytest.mark.parametrize(
    ("values", "prompts", "says"),
    [
        ([], None, "no pictures"),
        ([np.nan, np.nan], None, "no score to any of 2 pictures (all NaN)"),
        ([1.0, np.nan], None, "only one of 2"),
        ([3.0, 3.0], None, "gave 3 to every one of 2 pictures, so"),
        ([3.0, 3.0, np.nan], "aab", "gave 3 to every one of 3 pictures of 2 prompts, where it gave one at all, so"),
        ([0.0, 0.0], "aa", "gave 0 to every one of 2 pictures of one prompt"),
        ([1.0, 1.0, 2.0, 2.0], "aabb", "same score to all pictures of a prompt, for 4 pictures of 2 prompts"),
        ([1.0, 1.0, 2.0, 2.0], None, ""),
        ([1.0, 1.0, 2.0, 2.0], "abab", ""),
        ([1.0, 1.0, 2.0, 2.5], "aabb", ""),
        ([1.0, np.nan, 2.0, np.nan], "aabb", "same score to all pictures"),
        ([1.0], None, ""),
    ],
)
def test_describe(values, prompts, says) -> None:
    said = describe(Scores(np.array(values, dtype=float)), prompts and list(prompts))
    assert (says in said) if says else said == ""
