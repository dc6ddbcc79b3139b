"""The local viewer on tiny models of the true classes: batched greedy answers are those of one call per picture."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import tiny_viewers
from tiller.rewards.judge.local import PLAIN, LocalViewer
from tiller.rewards.judge.stills import processor_kind, without_film
from tiller.rewards.judge.viewer import Failure, checked, legible
from tiller.types import ConfigError

NOISE = np.random.default_rng(0)
PICTURES = [
    Image.fromarray(NOISE.integers(0, 256, (*size, 3), dtype=np.uint8))
    for size in ((24, 24), (24, 24), (24, 24), (24, 40), (24, 24))
]
QUESTIONS = ["what is it?", "what is it?", "how many are there?", "what is it?", "who is it?"]
LENGTH = 6
CAPTIONERS = ("BlipForConditionalGeneration", "BlipForQuestionAnswering")


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory) -> str:
    return tiny_viewers.VIEWERS[request.param](tmp_path_factory.mktemp(request.param))


@lru_cache(maxsize=1)
def loaded(folder: str) -> tuple[str, Any, Any]:
    """The architecture, model and processor, by transformers' own calls."""
    kind = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    reader = {
        "SmolVLMForConditionalGeneration": "SmolVLMProcessor",
        "Qwen2VLForConditionalGeneration": "Qwen2VLProcessor",
        "Qwen2_5_VLForConditionalGeneration": "Qwen2_5_VLProcessor",
    }.get(kind)
    made = without_film(getattr(transformers, reader)) if reader else transformers.AutoProcessor
    return kind, getattr(transformers, kind).from_pretrained(folder).eval(), made.from_pretrained(folder)


def one_by_one(folder: str, image: Image.Image, question: str) -> str:
    """One picture and one question."""
    kind, model, processor = loaded(folder)
    if kind in PLAIN:
        text = PLAIN[kind].format(question=question)
    else:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=image, text=text, return_tensors="pt") if text else processor(image, return_tensors="pt")
    with torch.no_grad():
        written = model.generate(**inputs, do_sample=False, max_new_tokens=LENGTH)[0]
    if kind not in CAPTIONERS and not model.config.get_text_config().is_encoder_decoder:  # these repeat the question
        written = written[inputs["input_ids"].shape[1] :]
    return processor.decode(written, skip_special_tokens=True)


@pytest.mark.parametrize("folder", tiny_viewers.VIEWERS, indirect=True)
def test_answers_in_batches_are_those_of_single_calls(folder) -> None:
    answers = LocalViewer(folder, max_new_tokens=LENGTH, batch_size=3).ask(PICTURES, QUESTIONS)
    assert answers == [one_by_one(folder, image, ask) for image, ask in zip(PICTURES, QUESTIONS, strict=True)]
    assert len({answers[0], answers[1], answers[3]}) > 1  # the picture counts; otherwise nothing would be shown here


@pytest.mark.parametrize("folder", ["llava"], indirect=True)
def test_a_template_of_ones_own_is_what_the_model_reads(folder) -> None:
    plain = LocalViewer(folder, max_new_tokens=LENGTH).ask(PICTURES[:1], ["a {question} b"])
    written = LocalViewer(folder, template="<image>\n{question} Answer:", max_new_tokens=LENGTH)
    assert written.ask(PICTURES[:1], ["a {question} b"]) == plain
    assert LocalViewer(folder, template="<image>{question}", max_new_tokens=LENGTH).ask(PICTURES[:1], ["x"]) != plain


@pytest.mark.parametrize("folder", ["llava"], indirect=True)
def test_no_chat_template_and_none_given_is_refused(folder, tmp_path) -> None:
    transformers.AutoModelForImageTextToText.from_pretrained(folder).save_pretrained(tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    processor.chat_template = processor.tokenizer.chat_template = None
    processor.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has no chat template, so how to ask it is not known; set template"):
        LocalViewer(str(tmp_path)).ask(PICTURES[:1], ["x"])


@pytest.mark.parametrize("folder", ["qwen2_vl"], indirect=True)
def test_a_processor_for_films_reads_stills_without_torchvision(folder, monkeypatch) -> None:
    monkeypatch.setattr("transformers.utils.is_torchvision_available", lambda: False)
    kind = processor_kind(Path(folder))
    assert kind.__name__ == "Qwen2VLProcessor"
    assert kind.get_attributes() == ["image_processor", "tokenizer"]
    monkeypatch.setattr("transformers.utils.is_torchvision_available", lambda: True)
    assert processor_kind(Path(folder)) is transformers.AutoProcessor


# ---- what is done to an answer ----


def test_a_legible_answer_is_one_line_without_invisible_signs() -> None:
    assert legible(" a\tcat\x1b[31m\n\non a\u200b\u202e mat\x00 ") == "a cat [31m on a mat"
    assert legible("ab " * 1000, longest=7) == "ab ab a"
    assert legible("a \ud800b") == "a b"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "the judge's answer is empty"),
        ("\n\u200b ", "the judge's answer is empty"),
        ("!!! ...", "the judge's answer has no word in it"),
        (None, "the judge's answer is no text but a NoneType"),
        (Failure("timed\nout"), "timed out"),
    ],
)
def test_an_answer_without_words_is_a_failure_with_a_reason(answer, reason) -> None:
    assert checked(answer) == Failure(reason)


def test_words_of_any_script_are_an_answer() -> None:
    assert checked("猫") == "猫"
    assert checked("4") == "4"
