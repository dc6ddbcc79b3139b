"""The other denoiser: a transformer that learns rectified flow, for diffusers' stock `CogView4Pipeline`.

Text and latents go through the same blocks. Of the stock flow pipelines with guidance by two predictions, this one
spends little on a small model: one text encoder, no pooled vector, and prompts padded to a multiple of 16 tokens, where
Stable Diffusion 3, FLUX, AuraFlow, Lumina 2 and Sana come to 256 and more. It reads the text encoder's last state but
one, so the last layer is never used.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_cogview4 import CogView4Transformer2DModel
from diffusers.pipelines.cogview4.pipeline_cogview4 import CogView4Pipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTokenizer, GlmConfig, GlmModel

from tiller.pretrain.config import DenoiserConfig, FlowConfig
from tiller.pretrain.export import halved

BLOCK = 16  # the pipeline pads prompts, on the left, to a multiple of so many tokens
LONGEST = 1024  # tokens of a prompt, at which the pipeline cuts it
TRAINED = 64  # tokens at which a caption is cut in training


def schedule() -> FlowMatchEulerDiscreteScheduler:
    """Rectified flow (Liu et al. 2023; Esser et al. 2024) from sigma 1 to 0 in equal steps, without a shift."""
    return FlowMatchEulerDiscreteScheduler(shift=1.0)


def text_encoder(config: DenoiserConfig, vocabulary: int, end: int) -> GlmModel:
    """Causal, so that a word knows those before it; one layer more than are read."""
    heads = config.text_width // 48
    return GlmModel(
        GlmConfig(
            vocab_size=vocabulary,
            hidden_size=config.text_width,
            intermediate_size=3 * config.text_width,
            num_hidden_layers=config.text_layers + 1,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=48,
            max_position_embeddings=LONGEST,
            attention_dropout=0.0,
            bos_token_id=end - 1,
            eos_token_id=end,
            pad_token_id=end,
        )
    )


def transformer(flow: FlowConfig, channels: int, size: int, text_width: int) -> CogView4Transformer2DModel:
    """For latents (B, channels, size, size)."""
    return CogView4Transformer2DModel(
        patch_size=flow.patch,
        in_channels=channels,
        out_channels=channels,
        num_layers=flow.layers,
        attention_head_dim=flow.head_width,
        num_attention_heads=flow.width // flow.head_width,
        text_embed_dim=text_width,
        time_embed_dim=flow.time_width,
        condition_dim=16,  # of the picture's size, which is always the same
        sample_size=size,
        rope_axes_dim=(size // flow.patch, size // flow.patch),
    )


class FlowDenoiser(nn.Module):
    """v(x_sigma, sigma, tokens): (B, C, h, w) latents, (B,) sigmas, (B, L) token ids to (B, C, h, w)."""

    def __init__(
        self, config: DenoiserConfig, flow: FlowConfig, pixels: int, channels: int, size: int, vocabulary: int, end: int
    ) -> None:
        super().__init__()
        self.flow, self.pixels, self.padding = flow, pixels, end
        self.text = text_encoder(config, vocabulary, end)
        self.transformer = transformer(flow, channels, size, config.text_width)
        start_as_identity(self.transformer)
        self.text.layers[-1].requires_grad_(False)
        self.text.norm.requires_grad_(False)

    def forward(self, latents: Tensor, sigmas: Tensor, tokens: Tensor) -> Tensor:
        states = self.text(tokens, output_hidden_states=True).hidden_states[-2]  # (B, L, D)
        size = latents.new_full((len(latents), 2), float(self.pixels))
        corner = torch.zeros_like(size)
        return self.transformer(latents, states, 1000 * sigmas, size, size, corner).sample

    def loss(self, latents: Tensor, tokens: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """`flow_loss` at times (B,) in [0, 1)."""
        seen = trimmed(tokens, self.padding)
        return flow_loss(self, latents, seen, sigma_of(times, self.flow), noise)

    def tokenise(self, tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
        """Token ids (N, L), padded on the left to a multiple of 16, as the pipeline makes them."""
        found = tokenizer(texts, padding="longest", pad_to_multiple_of=BLOCK, max_length=TRAINED, truncation=True)
        return torch.tensor(found.input_ids)

    def pipeline(self, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> CogView4Pipeline:
        """The parts as one pipeline, weights in fp16."""
        parts: dict[str, Any] = {"vae": halved(vae), "text_encoder": halved(self.text)}
        parts |= {"tokenizer": tokenizer, "transformer": halved(self.transformer), "scheduler": schedule()}
        return CogView4Pipeline(**parts)


def start_as_identity(transformer: CogView4Transformer2DModel) -> None:
    """Weights as in Peebles & Xie 2023 (DiT): Xavier, biases 0, and every gate and the output closed."""
    for name, layer in transformer.named_modules():
        if isinstance(layer, nn.Linear):
            closed = name.endswith(("norm1.linear", "norm_out.linear")) or name == "proj_out"
            (nn.init.zeros_ if closed else nn.init.xavier_uniform_)(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def trimmed(tokens: Tensor, padding: int) -> Tensor:
    """The tokens (B, L) without blocks of 16 on the left that are padding in every row, as the pipeline has them."""
    while tokens.shape[1] > BLOCK and bool((tokens[:, :BLOCK] == padding).all()):
        tokens = tokens[:, BLOCK:]
    return tokens


def sigma_of(times: Tensor, flow: FlowConfig) -> Tensor:
    """Noise levels (B,) in (0, 1) of uniform numbers (B,) in [0, 1): the same, or logit-normal (Esser et al. 2024)."""
    if flow.sigmas == "uniform":
        return times.float()
    return torch.special.ndtri(times.clamp(1e-4, 1 - 1e-4)).sigmoid().float()


def forward_noised(latents: Tensor, noise: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """x_sigma = (1 - sigma) x0 + sigma eps and its velocity dx/dsigma = eps - x0; both (B, C, h, w)."""
    level = sigmas[:, None, None, None]
    return (1 - level) * latents + level * noise, noise - latents


def flow_loss(model: nn.Module, latents: Tensor, tokens: Tensor, sigmas: Tensor, noise: Tensor) -> Tensor:
    """Mean square error of the velocity (Esser et al. 2024, SD3, eq. 14 with unit weight); ()."""
    noisy, target = forward_noised(latents, noise, sigmas)
    with plain_attention(latents.device):
        output = model(noisy, sigmas, tokens)
    return (output.float() - target).square().mean()


def plain_attention(device: torch.device) -> AbstractContextManager[None]:
    """Attention as two matrix products: for so few tokens a CPU's fused kernel is slower, backwards above all."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
