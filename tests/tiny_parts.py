"""Tokenizers, text encoders and autoencoders of a few thousand random weights, for the pipelines in `tiny`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

LETTERS = sorted(ByteLevel.alphabet())
START, END = "<|startoftext|>", "<|endoftext|>"


def seeded(make: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """`make(*args, **settings)` in evaluation mode with the weights of seed 0; the global generator is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(*args, **settings).eval()


def clip_tokenizer(length: int = 77) -> Any:
    """CLIP's byte-level tokenizer without merges: one token per letter."""
    tokens = [*LETTERS, *(letter + "</w>" for letter in LETTERS), START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=length)


def t5_tokenizer() -> Any:
    """T5's tokenizer with single letters as pieces."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    return transformers.T5Tokenizer(
        vocab=[(piece, -float(rank)) for rank, piece in enumerate(pieces)], extra_ids=0, model_max_length=77
    )


def qwen_tokenizer(template: str | None = None) -> Any:
    """Qwen's byte-level tokenizer without merges, with a chat template."""
    special = [
        END,
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ]
    vocabulary = {token: index for index, token in enumerate([*LETTERS, *special])}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=512)
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = template or (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def clip_text(hidden: int = 16, projection: bool = False) -> Any:
    """A CLIP text encoder of two layers; with `projection` the pooled output that SDXL and SD3 ask for."""
    config = transformers.CLIPTextConfig(
        vocab_size=2 * len(LETTERS) + 2,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=hidden,
        bos_token_id=2 * len(LETTERS),
        eos_token_id=2 * len(LETTERS) + 1,
        pad_token_id=2 * len(LETTERS) + 1,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return seeded(kind, config)


def t5(hidden: int = 32) -> Any:
    """A T5 encoder of one layer."""
    config = transformers.T5Config(
        vocab_size=32, d_model=hidden, d_kv=8, d_ff=hidden, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return seeded(transformers.T5EncoderModel, config)


def t5_pair() -> dict[str, Any]:
    """A T5 encoder and its tokenizer, as a pipeline names them."""
    return {"text_encoder": t5(), "tokenizer": t5_tokenizer()}


def kl(latent_channels: int = 4, **settings: Any) -> Any:
    """A KL autoencoder that halves the picture once."""
    return seeded(
        diffusers.AutoencoderKL,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=latent_channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **settings,
    )


def unet(**settings: Any) -> Any:
    """A conditional U-Net with two resolutions, attention at the lower one."""
    return seeded(
        diffusers.UNet2DConditionModel,
        **{
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "layers_per_block": 1,
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            **settings,
        },
    )
