"""Tiny video pipelines: Wan, SkyReels, LTX and AnimateDiff."""

from __future__ import annotations

from typing import Any

import diffusers

import tiny
import tiny_parts as parts
from tiny import flow


def _wan_transformer(kind: Any = diffusers.WanTransformer3DModel) -> Any:
    return parts.seeded(
        kind,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )


def _wan(scheduler: Any) -> dict[str, Any]:
    autoencoder = parts.seeded(
        diffusers.AutoencoderKLWan,
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    return {"transformer": _wan_transformer(), "vae": autoencoder, "scheduler": scheduler, **parts.t5_pair()}


def _unipc() -> Any:
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def tiny_wan() -> Any:
    """Wan 2.1: video latents, rectified flow."""
    return diffusers.WanPipeline(**_wan(flow(shift=7.0)))


def tiny_wan_two() -> Any:
    """Wan 2.2: one transformer for the noisy steps, another for the clean ones, and a multistep solver."""
    return diffusers.WanPipeline(**_wan(_unipc()), transformer_2=_wan_transformer(), boundary_ratio=0.875)


def tiny_skyreels() -> Any:
    """SkyReels-V2 diffusion forcing: a scheduler of its own for every frame, and latents written in place."""
    made = {**_wan(_unipc()), "transformer": _wan_transformer(diffusers.SkyReelsV2Transformer3DModel)}
    return diffusers.SkyReelsV2DiffusionForcingPipeline(**made)


def tiny_ltx() -> Any:
    """LTX-Video: packed video latents."""
    transformer = parts.seeded(
        diffusers.LTXVideoTransformer3DModel,
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    )
    autoencoder = parts.seeded(
        diffusers.AutoencoderKLLTXVideo,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    )
    return diffusers.LTXPipeline(transformer=transformer, vae=autoencoder, scheduler=flow(), **parts.t5_pair())


def tiny_animatediff() -> Any:
    """AnimateDiff: motion modules between the layers of a Stable Diffusion U-Net, frames folded into the batch."""
    adapter = parts.seeded(
        diffusers.MotionAdapter,
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
    )
    return diffusers.AnimateDiffPipeline(
        vae=parts.kl(),
        text_encoder=parts.clip_text(),
        tokenizer=parts.clip_tokenizer(),
        unet=parts.unet(),
        motion_adapter=adapter,
        scheduler=tiny.ddim(),
    )
