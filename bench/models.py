"""Stable Diffusion pipelines of true sizes with random weights, built on the spot: no hub, no downloads."""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

Size = Literal["sd15", "sd15-full", "embedded", "small"]
PROMPTS = ("a cat", "a dog", "a horse", "a monkey", "a rabbit", "a zebra", "a spider", "a bird")
START, END = "<|startoftext|>", "<|endoftext|>"

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

SD15_UNET = {
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
SMALL_UNET = {
    "block_out_channels": (96, 192, 256),
    "layers_per_block": 1,
    "cross_attention_dim": 128,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
}
TINY_VAE = {"block_out_channels": (8, 16), "norm_num_groups": 4}
SD15_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}


def pipeline(size: Size, latents: int | None = None) -> Any:
    """A pipeline by name; `latents` is the side of its latents where another one than the default is wanted.

    sd15: Stable Diffusion 1.5's denoiser (860 M weights) between a tiny autoencoder and a tiny text encoder;
    sd15-full: with its autoencoder and text encoder at their true sizes too; embedded: the model that comes with
    tiller, or one of its default shape where none is shipped; small: 12 M weights, the one to hold against a peer.
    """
    torch.manual_seed(0)
    if size == "embedded":
        return _embedded()
    if size == "small":
        return _stable_diffusion(SMALL_UNET, latents or 16, TINY_VAE, _text(128, 2))
    if size == "sd15":
        return _stable_diffusion(SD15_UNET, latents or 32, TINY_VAE, _text(768, 1))
    return _stable_diffusion(SD15_UNET, latents or 64, SD15_VAE, _text(768, 12))


def _stable_diffusion(unet: dict[str, Any], latents: int, vae: dict[str, Any], text: CLIPTextModel) -> Any:
    levels = len(vae["block_out_channels"])
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels, **vae
    )
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    denoiser = UNet2DConditionModel(sample_size=latents, **unet)
    return _assembled(denoiser, autoencoder, text, _tokenizer(77), scheduler)


def _embedded() -> Any:
    from tiller import emoji
    from tiller.policy.loading import load_pipeline
    from tiller.pretrain.config import AutoencoderConfig, DenoiserConfig
    from tiller.pretrain.denoiser import PROMPT_TOKENS, Denoiser, schedule

    if (emoji.FOLDER / emoji.MODELS["emoji"] / "model_index.json").exists():
        return load_pipeline("emoji", dtype=torch.float32)
    config, channels = DenoiserConfig(), AutoencoderConfig().latent_channels
    tokenizer = _tokenizer(PROMPT_TOKENS)
    model = Denoiser(config, channels, 8, len(tokenizer), tokenizer.eos_token_id)
    autoencoder = AutoencoderKL(
        block_out_channels=AutoencoderConfig().channels,
        latent_channels=channels,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    return _assembled(model.unet, autoencoder, model.text, tokenizer, schedule())


def _assembled(unet: Any, vae: Any, text: Any, tokenizer: Any, scheduler: Any) -> Any:
    return StableDiffusionPipeline(
        unet=unet.eval(),
        vae=vae.eval(),
        text_encoder=text.eval(),
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _text(width: int, layers: int) -> CLIPTextModel:
    vocabulary = 2 * len(ByteLevel.alphabet())
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary + 2,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // 64),
            bos_token_id=vocabulary,
            eos_token_id=vocabulary + 1,
            pad_token_id=vocabulary + 1,
        )
    )


def _tokenizer(length: int) -> CLIPTokenizer:
    """CLIP's byte-level tokenizer without merges: one token per letter."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), START, END]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=length)
