"""The text in a picture: its closed forms, and two kinds of readers against greedy decoding done by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from transformers import ViTImageProcessorPil

import plain_llava
import tiny_parts as parts
import tiny_scorers as tiny
from tiller.rewards import score
from tiller.rewards.scorers.ocr import OCR, accuracy, levenshtein, quoted
from tiller.types import ConfigError, RewardError, Score


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [
        ("", "", 0),
        ("", "abc", 3),
        ("abc", "", 3),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("ab", "ba", 2),
        ("saturday", "sunday", 3),
        ("aaaa", "a", 3),
    ],
)
def test_levenshtein(first, second, distance) -> None:
    assert levenshtein(first, second) == levenshtein(second, first) == distance


@pytest.mark.parametrize(
    ("target", "text", "value"),
    [
        ("OPEN", "open", 1.0),
        ("Happy Birthday", "happy\nbirth day", 1.0),  # spaces do not count
        ("open", "we are open today", 1.0),  # contained
        ("open", "oben", 0.75),
        ("open", "", 0.0),
        ("open", "xyzxyzxyz", 0.0),  # 9 edits, counted as 4
        ("ab", "ax and more", 0.0),  # what is read besides counts as edits
        ("hello", "helo", 0.8),
    ],
)
def test_accuracy_is_one_minus_the_share_of_edits(target, text, value) -> None:
    assert accuracy(target, text) == pytest.approx(value)


def test_the_target_is_the_first_quoted_text() -> None:
    assert quoted('a sign that says "OPEN" beside "CLOSED"') == "OPEN"
    assert quoted("a sign that says “Café”") == "Café"
    assert quoted("a sign") == quoted('an inch is 1"') == ""
    with pytest.raises(ValueError, match="empty"):
        accuracy("  ", "open")


class Fixed:
    """A reader that says what it is told to, and breaks on pictures of one size."""

    def answers(self, images, questions, length):
        if any(image.size == (13, 13) for image in images):
            raise RuntimeError("13")
        return [f"{image.width}" for image in images]


def test_what_cannot_be_read_is_missing_and_never_zero(monkeypatch) -> None:
    reward = OCR("unused")
    reward.__dict__["reader"] = Fixed()
    images = tiny.pictures((32, 8), (13, 13), (40, 8), (13, 13), (50, 8), (60, 8))
    prompts = ['"32"', '"13"', "a sign", "another", "a sign", '" "']
    metadata = [{}, {}, {"text": "45"}, {}, {"other": "50"}, {}]
    scores = score(reward, images, prompts, metadata)
    assert scores.values[[0, 2]].tolist() == [1.0, 0.5]
    assert not scores.valid[[1, 3, 4, 5]].any()
    assert scores.reasons[1] == "the reader failed: RuntimeError: 13"
    assert scores.reasons[3] == "the prompt quotes no text, and the metadata has no 'text'"
    assert scores.reasons[5] == "the text asked for is empty"
    assert scores.notes[2] == "40"
    with pytest.raises(RewardError, match="ocr scores single pictures, but was given a video of 2 frames"):
        reward([images[:2]], ["a"], [{}])


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llava")
    tiny.llava(path)
    return path


def test_a_model_that_is_asked_reads_greedily(llava) -> None:
    """Pictures of three sizes in two batches; the next token is always the likeliest of LLaVA written out."""
    images = tiny.pictures((32, 32), (64, 40), (33, 90))
    weights = transformers.LlavaForConditionalGeneration.from_pretrained(llava).state_dict()
    tokenizer = transformers.AutoTokenizer.from_pretrained(llava)
    mark = tokenizer.convert_tokens_to_ids("<image>")
    expected = []
    for image in images:
        tokens = [*tokenizer.encode("user: "), mark, *tokenizer.encode("What? assistant:")]
        start = len(tokens)
        ends = (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>"))
        while len(tokens) < start + 5 and tokens[-1] not in ends:
            tokens.append(int(plain_llava.log_probs(weights, tiny.clip_pixels(image), tokens, mark)[-1].argmax()))
        expected.append(tokenizer.decode(tokens[start:], skip_special_tokens=True))
    assert len(set(expected)) > 1
    reward = OCR(str(llava), question="What?", length=5, batch_size=2, device="cpu")
    scores = reward(images, ['"abcd"'] * 3, [{}] * 3)
    assert [one.note for one in scores] == expected
    assert scores == [Score(accuracy("abcd", text), note=text) for text in expected]


def test_a_model_that_only_reads_is_asked_nothing(tmp_path) -> None:
    """A pair of a ViT and a text decoder, as TrOCR is one, against its own forward, token by token."""
    tokenizer = parts.qwen_tokenizer()
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    eyes = transformers.ViTConfig(image_size=32, patch_size=8, **size)
    hand = transformers.TrOCRConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        cross_attention_hidden_size=16,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        max_position_embeddings=32,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=2,
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(eyes, hand)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, tokenizer.pad_token_id, 1
    model = tiny.spread(parts.seeded(transformers.VisionEncoderDecoderModel, config))
    model.generation_config.update(decoder_start_token_id=2, pad_token_id=tokenizer.pad_token_id, eos_token_id=1)
    model.save_pretrained(tmp_path)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    transformers.TrOCRProcessor(processor, tokenizer).save_pretrained(tmp_path)
    images = tiny.pictures((32, 32), (64, 40), (33, 90))
    ends = (1, tokenizer.convert_tokens_to_ids("<|im_end|>"))
    expected = []
    for image in images:
        pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
        tokens = [2]
        while len(tokens) < 7 and tokens[-1] not in ends:
            with torch.no_grad():
                logits = model(pixel_values=pixels, decoder_input_ids=torch.tensor([tokens])).logits
            tokens.append(int(logits[0, -1].argmax()))
        expected.append(tokenizer.decode(tokens, skip_special_tokens=True))
    reward = OCR(str(tmp_path), question="", length=6, batch_size=2, device="cpu")
    assert [one.note for one in reward(images, ['"abcd"'] * 3, [{}] * 3)] == expected


def test_a_layout_without_its_hole_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ocr: the layout '<image>' has no \{\}"):
        OCR(layout="<image>")
