"""Tiny random models of the architectures that the scorers load, written to a folder as transformers would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil

import tiny_parts as parts

WORDS = 2 * len(parts.LETTERS)  # CLIP's vocabulary without its two marks


def pictures(*sizes: tuple[int, int], seed: int = 0) -> list[Image.Image]:
    """Pictures of smooth random colours, one per (width, height)."""
    random = np.random.default_rng(seed)
    coarse = [Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8)) for _ in sizes]
    return [image.resize(size, Image.Resampling.BICUBIC) for image, size in zip(coarse, sizes, strict=True)]


def clip_config(act: str = "quick_gelu") -> Any:
    """CLIP with two layers in each tower and 12 numbers per embedding."""
    tower = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": act}
    text = {"vocab_size": WORDS + 2, "hidden_size": 16, "max_position_embeddings": 24, **tower}
    text |= {"bos_token_id": WORDS, "eos_token_id": WORDS + 1, "pad_token_id": WORDS + 1}
    vision = {"hidden_size": 16, "image_size": 32, "patch_size": 8, **tower}
    return transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)


def clip(folder: Path, **config: Any) -> Any:
    """A CLIP model with its processor in `folder`; returned for the test to compute with."""
    model = spread(parts.seeded(transformers.CLIPModel, clip_config(**config)))
    model.save_pretrained(folder)
    parts.clip_tokenizer(length=24).save_pretrained(folder)
    square = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square).save_pretrained(folder)
    return model


CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def llava(folder: Path, chat: str | None = CHAT) -> Any:
    """LLaVA: CLIP's picture tower of three layers, a Llama of two, 16 picture tokens, one token per letter."""
    tokenizer = parts.qwen_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = None
    mark = tokenizer.convert_tokens_to_ids("<image>")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    vision = {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, "num_hidden_layers": 3, **size}
    text = transformers.LlamaConfig(
        vocab_size=len(tokenizer), num_hidden_layers=2, num_key_value_heads=1, pad_token_id=0, **size
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=mark)
    model = spread(parts.seeded(transformers.LlavaForConditionalGeneration, config))
    model.generation_config.update(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    square = {"height": 32, "width": 32}
    transformers.LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat,
    ).save_pretrained(folder)
    return model


def spread(model: Any) -> Any:
    """The same model with weights large enough that what it says depends on what it is shown."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5)
            elif "bias" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


def clip_pixels(image: Image.Image, side: int = 32) -> Tensor:
    """CLIP's preprocessing, written out: shorter edge to `side` by PIL, the middle, the published mean and std."""
    width, height = image.size
    size = (side, side * height // width) if width <= height else (side * width // height, side)
    small = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    left, top = (small.width - side) // 2, (small.height - side) // 2
    square = np.asarray(small.crop((left, top, left + side, top + side)), dtype=np.float64) / 255
    normal = (square - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    return torch.tensor(normal.transpose(2, 0, 1), dtype=torch.float32)


def letters(text: str) -> list[int]:
    """A text as the tokens of `tiny_parts.clip_tokenizer`, with both marks: the last letter of a word has `</w>`."""
    tokens = [WORDS]
    for word in text.lower().split():
        tokens += [parts.LETTERS.index(letter) for letter in word]
        tokens[-1] += len(parts.LETTERS)
    return [*tokens, WORDS + 1]
