"""A denoiser: a U-Net with cross-attention and the text encoder that is trained with it. The other is in `flow`."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tiller.pretrain.config import DenoiserConfig
from tiller.pretrain.export import halved

PROMPT_TOKENS = 24


def schedule() -> DDIMScheduler:
    """Stable Diffusion's noise schedule (Rombach et al. 2022), with v-prediction (Salimans & Ho 2022)."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


class Denoiser(nn.Module):
    """v(x_t, t, tokens): (B, C, h, w) latents, (B,) timesteps, (B, L) token ids to (B, C, h, w)."""

    def __init__(self, config: DenoiserConfig, channels: int, size: int, vocabulary: int, end: int) -> None:
        super().__init__()
        levels = len(config.channels)
        self.scheduler = schedule()
        self.text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocabulary,
                hidden_size=config.text_width,
                intermediate_size=4 * config.text_width,
                num_hidden_layers=config.text_layers,
                num_attention_heads=max(1, config.text_width // 48),
                max_position_embeddings=PROMPT_TOKENS,
                bos_token_id=end - 1,
                eos_token_id=end,
                pad_token_id=end,
            )
        )
        self.unet = UNet2DConditionModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            down_block_types=("CrossAttnDownBlock2D",) * levels,
            up_block_types=("CrossAttnUpBlock2D",) * levels,
            block_out_channels=config.channels,
            mid_block_type=None,  # costs a quarter of the weights at the coarsest level, and is not missed
            layers_per_block=config.layers,
            cross_attention_dim=config.text_width,
            attention_head_dim=4,  # diffusers reads this as the number of heads
            norm_num_groups=math.gcd(32, *config.channels),
        ).to(memory_format=torch.channels_last)
        self.unet.set_attn_processor(AttnProcessor())  # for so few tokens faster on a CPU than the fused kernel

    def forward(self, latents: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        states = self.text(tokens).last_hidden_state  # (B, L, D)
        return self.unet(latents, timesteps, encoder_hidden_states=states).sample

    def loss(self, latents: Tensor, tokens: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """`denoising_loss` at times (B,) in [0, 1)."""
        return denoising_loss(self, self.scheduler, latents, tokens, (1000 * times).long(), noise)

    def tokenise(self, tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
        """Token ids (N, L) as the pipeline makes them."""
        return tokenise(tokenizer, texts)

    def pipeline(self, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
        """The parts as one pipeline, weights in fp16."""
        parts: dict[str, Any] = {"vae": halved(vae), "text_encoder": halved(self.text), "unet": halved(self.unet)}
        parts |= {"tokenizer": tokenizer, "scheduler": schedule()}
        parts |= dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
        return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def tokenise(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids (N, L), as diffusers' Stable Diffusion pipeline makes them."""
    found = tokenizer(texts, padding="max_length", max_length=PROMPT_TOKENS, truncation=True)
    return torch.tensor(found.input_ids)


def denoising_loss(
    model: Denoiser,
    scheduler: DDIMScheduler,
    latents: Tensor,
    tokens: Tensor,
    timesteps: Tensor,
    noise: Tensor,
) -> Tensor:
    """Mean square error of v = alpha_t * noise - sigma_t * x0 at x_t = alpha_t * x0 + sigma_t * noise; ()."""
    when = cast(torch.IntTensor, timesteps)
    noisy = scheduler.add_noise(latents, noise, when)
    target = scheduler.get_velocity(latents, noise, when)
    output = model(noisy.contiguous(memory_format=torch.channels_last), timesteps, tokens)
    return (output.float() - target).square().mean()
