"""Tiny vision-language models of the true classes, with random weights and one token per byte, saved to folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import tiny_parts as parts
from tiller.rewards.judge.stills import without_film

IMAGE, EDGE = "<image>", "<fake_token_around_image>"
CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} Answer:{% endif %}"
)
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
SIGHT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SQUARE = {"height": 16, "width": 16}


def tokenizer(*special: str) -> Any:
    """One token per byte, and the special ones."""
    vocabulary = {token: index for index, token in enumerate([*parts.LETTERS, parts.END, *special])}
    made = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=512)
    made.add_special_tokens({"additional_special_tokens": list(special), "pad_token": parts.END})
    return made


def ends(words: Any) -> dict[str, int]:
    """The ids that a language model's configuration asks for."""
    return {
        "vocab_size": len(words) + 8,  # room for what the processor adds
        "bos_token_id": words.convert_tokens_to_ids(parts.END),
        "eos_token_id": words.convert_tokens_to_ids(parts.END),
        "pad_token_id": words.convert_tokens_to_ids(parts.END),
    }


def lively(kind: Any, config: Any) -> Any:
    """The model with weights so large that what it says depends on what it sees."""
    model = parts.seeded(kind, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                fan_in = weight[0].numel()
                weight.copy_(torch.randn(weight.shape, generator=generator) * (2.5 / fan_in**0.5))
    return model


def pictures_16() -> Any:
    return transformers.CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE)


def save(folder: Path, model: Any, processor: Any) -> str:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def llava(folder: Path) -> str:
    words = tokenizer(IMAGE)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(image_size=16, patch_size=8, **SIGHT),
        text_config=transformers.LlamaConfig(**TEXT, **ends(words)),
        image_token_index=words.convert_tokens_to_ids(IMAGE),
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        image_seq_length=4,
    )
    processor = transformers.LlavaProcessor(
        pictures_16(),
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT.replace("IMAGE", IMAGE + "\n"),
    )
    return save(folder, lively(transformers.LlavaForConditionalGeneration, config), processor)


def llava_next(folder: Path) -> str:
    words = tokenizer(IMAGE)
    grid = [[16, 32], [32, 16], [32, 32]]
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(image_size=16, patch_size=8, **SIGHT),
        text_config=transformers.LlamaConfig(**TEXT, **ends(words)),
        image_token_index=words.convert_tokens_to_ids(IMAGE),
        image_grid_pinpoints=grid,
        vision_feature_layer=-1,
    )
    images = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size=SQUARE, image_grid_pinpoints=grid
    )
    processor = transformers.LlavaNextProcessor(
        images,
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT.replace("IMAGE", IMAGE),
    )
    return save(folder, lively(transformers.LlavaNextForConditionalGeneration, config), processor)


def _bert_words() -> Any:
    letters = "abcdefghijklmnopqrstuvwxyz?:"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    return transformers.BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, model_max_length=64)


def _blip(folder: Path, kind: Any) -> str:
    words = _bert_words()
    config = transformers.BlipConfig(
        vision_config={"image_size": 16, "patch_size": 8, **SIGHT},
        text_config={
            "vocab_size": len(words) + 2,
            "encoder_hidden_size": 32,
            "max_position_embeddings": 128,
            "bos_token_id": 2,
            "sep_token_id": 3,
            "eos_token_id": 3,
            "pad_token_id": 0,
            **SIGHT,
        },
    )
    images = transformers.BlipImageProcessorPil(size=SQUARE)
    return save(folder, lively(kind, config), transformers.BlipProcessor(images, words))


def blip(folder: Path) -> str:
    return _blip(folder, transformers.BlipForConditionalGeneration)


def blip_vqa(folder: Path) -> str:
    return _blip(folder, transformers.BlipForQuestionAnswering)


def _blip_2(folder: Path, text: Any, words: Any) -> str:
    processor = transformers.Blip2Processor(transformers.BlipImageProcessorPil(size=SQUARE), words, num_query_tokens=3)
    config = transformers.Blip2Config(
        vision_config={"image_size": 16, "patch_size": 8, "initializer_range": 0.02, **SIGHT},
        qformer_config={"vocab_size": 64, "encoder_hidden_size": 32, **SIGHT},
        text_config=text,
        num_query_tokens=3,
        image_token_index=processor.tokenizer.convert_tokens_to_ids(IMAGE),
    )
    return save(folder, lively(transformers.Blip2ForConditionalGeneration, config), processor)


def blip_2_opt(folder: Path) -> str:
    words = tokenizer()
    text = transformers.OPTConfig(
        hidden_size=32,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=256,
        **ends(words),
    )
    return _blip_2(folder, text, words)


def blip_2_t5(folder: Path) -> str:
    words = parts.t5_tokenizer()
    text = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return _blip_2(folder, text, words)


def idefics2(folder: Path) -> str:
    words = tokenizer(EDGE, IMAGE, "<end_of_utterance>")
    config = transformers.Idefics2Config(
        vision_config={"image_size": 32, "patch_size": 8, **SIGHT},
        perceiver_config={
            "hidden_size": 32,
            "resampler_n_latents": 2,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "num_key_value_heads": 1,
        },
        text_config=transformers.MistralConfig(**TEXT, **ends(words)),
        image_token_id=words.convert_tokens_to_ids(IMAGE),
    )
    images = transformers.Idefics2ImageProcessorPil(
        size={"shortest_edge": 16, "longest_edge": 32}, do_image_splitting=False
    )
    processor = transformers.Idefics2Processor(
        images, words, image_seq_len=2, chat_template=CHAT.replace("IMAGE", IMAGE)
    )
    return save(folder, lively(transformers.Idefics2ForConditionalGeneration, config), processor)


GRID = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]


def _idefics3(folder: Path, config_kind: Any, kind: Any, images: Any, processor_kind: Any) -> str:
    words = tokenizer(EDGE, IMAGE, "<end_of_utterance>", "<global-img>", *GRID)
    config = config_kind(
        vision_config={"image_size": 16, "patch_size": 4, **SIGHT},
        text_config=transformers.LlamaConfig(**TEXT, **ends(words)),
        image_token_id=words.convert_tokens_to_ids(IMAGE),
        scale_factor=2,
    )
    films = () if processor_kind is transformers.Idefics3Processor else (None,)
    processor = processor_kind(images, words, *films, image_seq_len=4, chat_template=CHAT.replace("IMAGE", IMAGE))
    return save(folder, lively(kind, config), processor)


def idefics3(folder: Path) -> str:
    images = transformers.Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    return _idefics3(
        folder,
        transformers.Idefics3Config,
        transformers.Idefics3ForConditionalGeneration,
        images,
        transformers.Idefics3Processor,
    )


def smolvlm(folder: Path) -> str:
    images = transformers.SmolVLMImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    return _idefics3(
        folder,
        transformers.SmolVLMConfig,
        transformers.SmolVLMForConditionalGeneration,
        images,
        without_film(transformers.SmolVLMProcessor),
    )


QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def _qwen(folder: Path, config_kind: Any, kind: Any, processor_kind: Any, sight: dict[str, Any]) -> str:
    words = tokenizer(*QWEN)
    ids = dict(zip(QWEN, words.convert_tokens_to_ids(list(QWEN)), strict=True))
    config = config_kind(
        vision_config={"depth": 2, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, **sight},
        text_config={**TEXT, **ends(words), "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 512}
    )
    template = CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = without_film(processor_kind)(images, words, chat_template=template)
    return save(folder, lively(kind, config), processor)


def qwen2_vl(folder: Path) -> str:
    sight = {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 1}
    return _qwen(
        folder,
        transformers.Qwen2VLConfig,
        transformers.Qwen2VLForConditionalGeneration,
        transformers.Qwen2VLProcessor,
        sight,
    )


def qwen2_5_vl(folder: Path) -> str:
    sight = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "out_hidden_size": 32,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    return _qwen(
        folder,
        transformers.Qwen2_5_VLConfig,
        transformers.Qwen2_5_VLForConditionalGeneration,
        transformers.Qwen2_5_VLProcessor,
        sight,
    )


VIEWERS: dict[str, Callable[[Path], str]] = {
    made.__name__: made
    for made in (
        llava, llava_next, blip, blip_vqa, blip_2_opt, blip_2_t5, idefics2, idefics3, smolvlm, qwen2_vl, qwen2_5_vl,
    )
}  # fmt: skip
