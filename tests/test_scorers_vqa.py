"""P("Yes") of a model that sees, against LLaVA written out in plain torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import plain_llava
import tiny_scorers as tiny
from tiller.rewards import score
from tiller.rewards.scorers.vqa_score import VQAScore
from tiller.types import ConfigError, RewardError

SIZES = [(32, 32), (64, 40), (33, 90)]
PROMPTS = ["a cat", "", "two {} dogs, a long caption"]
SAID = 'user: <image>Does this figure show "{}"? Please answer Yes or No. assistant:'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llava")
    tiny.llava(path)
    return path


@pytest.fixture(scope="module")
def weights(folder: Path):
    return tiny.transformers.LlavaForConditionalGeneration.from_pretrained(folder).state_dict()


def answered(folder: Path, weights, image: Image.Image, text: str, answer: str) -> list[float]:
    """The log-probability of each token of the answer, one picture at a time, nothing filled up."""
    tokenizer = tiny.transformers.AutoTokenizer.from_pretrained(folder)
    mark = tokenizer.convert_tokens_to_ids("<image>")
    before = [index for part in text.split("<image>") for index in (*tokenizer.encode(part), mark)][:-1]
    said = tokenizer.encode(answer)
    logs = plain_llava.log_probs(weights, tiny.clip_pixels(image), before + said, mark)
    return [logs[len(before) - 1 + i, token].item() for i, token in enumerate(said)]


def test_the_score_is_the_geometric_mean_over_the_answers_tokens(folder, weights) -> None:
    """Three sizes, an empty prompt, a prompt with braces, batches in which shorter texts are filled up."""
    images = tiny.pictures(*SIZES)
    logs = [
        answered(folder, weights, im, SAID.replace("{}", p, 1), "Yes") for im, p in zip(images, PROMPTS, strict=True)
    ]
    assert [len(row) for row in logs] == [3, 3, 3]
    expected = np.exp([np.mean(row) for row in logs])
    assert np.ptp(np.log(expected)) > 0.01
    for batch_size in (1, 2, 3):
        reward = VQAScore(str(folder), device="cpu", batch_size=batch_size)
        np.testing.assert_allclose(score(reward, images, PROMPTS, [{}] * 3).values, expected, rtol=1e-4)


def test_one_token_needs_one_look(folder, weights, monkeypatch) -> None:
    images = tiny.pictures(*SIZES)
    reward = VQAScore(str(folder), answer="Y", other="N", device="cpu")
    logs = [answered(folder, weights, im, SAID.replace("{}", p, 1), "Y") for im, p in zip(images, PROMPTS, strict=True)]
    np.testing.assert_allclose(reward(images, PROMPTS, [{}] * 3), np.exp(logs)[:, 0], rtol=1e-4)
    calls = []
    forward = reward.reader.network.forward
    monkeypatch.setattr(reward.reader.network, "forward", lambda **inputs: calls.append(1) or forward(**inputs))
    VQAScore.__call__(reward, images, PROMPTS, [{}] * 3)
    assert calls == [1]


@pytest.mark.parametrize(("answer", "other"), [("Y", "N"), ("Yes", "No")])
def test_over_the_answers_the_two_add_up_to_one(folder, weights, answer, other) -> None:
    images = tiny.pictures(*SIZES)
    both = [
        [np.mean(answered(folder, weights, im, SAID.replace("{}", p, 1), said)) for said in (answer, other)]
        for im, p in zip(images, PROMPTS, strict=True)
    ]
    expected = [1 / (1 + np.exp(no - yes)) for yes, no in both]
    yes = VQAScore(str(folder), answer=answer, other=other, over="answers", device="cpu")(images, PROMPTS, [{}] * 3)
    no = VQAScore(str(folder), answer=other, other=answer, over="answers", device="cpu")(images, PROMPTS, [{}] * 3)
    np.testing.assert_allclose(yes, expected, rtol=1e-4)
    np.testing.assert_allclose(np.add(yes, no), 1, rtol=1e-6)


def test_question_and_layout_are_settings(folder, weights, tmp_path) -> None:
    images = tiny.pictures((32, 32))
    reward = VQAScore(str(folder), question="Is it {}?", layout="<image>\nQ: {} A:", device="cpu")
    expected = np.exp(np.mean(answered(folder, weights, images[0], "<image>\nQ: Is it a cat? A:", "Yes")))
    assert reward(images, ["a cat"], [{}]) == pytest.approx([expected], rel=1e-4)
    tiny.llava(tmp_path, chat=None)
    with pytest.raises(ConfigError, match=r"has no chat template; set layout to its text around a question"):
        VQAScore(str(tmp_path), device="cpu")(images, ["a cat"], [{}])
    for settings, sentence in {
        ("over", "both"): "over is 'both'; name vocabulary or answers",
        ("question", "Is it good?"): r"has no \{\}, which stands for the prompt",
        ("layout", "<image>"): r"has no \{\}, which stands for the question",
    }.items():
        with pytest.raises(ConfigError, match=sentence):
            VQAScore(str(folder), **dict([settings]))
    with pytest.raises(ConfigError, match="makes no token of ''"):
        VQAScore(str(folder), answer="", device="cpu")(images, ["a cat"], [{}])


def test_transparency_is_dropped_and_a_video_refused(folder) -> None:
    [image] = tiny.pictures((32, 32))
    clear = image.convert("RGBA")
    clear.putalpha(0)
    reward = VQAScore(str(folder), device="cpu")
    assert reward([clear], ["a cat"], [{}]) == reward([image], ["a cat"], [{}])
    with pytest.raises(RewardError, match="vqa_score scores single pictures, but was given a video of 2 frames"):
        reward([[image, image]], ["a cat"], [{}])


def test_half_precision_stays_close(folder) -> None:
    images = tiny.pictures(*SIZES)
    full, half = (VQAScore(str(folder), device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16"))
    logs = [np.log(reward(images, PROMPTS, [{}] * 3)) for reward in (full, half)]
    np.testing.assert_allclose(*logs, atol=0.15)
    assert half.reader.network.dtype is torch.bfloat16
