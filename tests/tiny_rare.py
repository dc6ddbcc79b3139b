"""Tiny pipelines whose loops do more than denoise: guidance with a memory, own gradients, copied schedulers."""

from __future__ import annotations

from typing import Any

import diffusers

import tiny
import tiny_parts as parts


def _sd(kind: Any, scheduler: Any = None, **more: Any) -> Any:
    made = tiny.tiny_sd(scheduler=scheduler).components
    made.pop("image_encoder", None)
    return kind(**made, requires_safety_checker=False, **more)


def tiny_sag() -> Any:
    """Self-attention guidance: the loop reads attention maps that a processor inside the U-Net has stored."""
    return _sd(diffusers.StableDiffusionSAGPipeline)


def tiny_safe() -> Any:
    """Safe Stable Diffusion: guidance with momentum, so a prediction hangs on earlier steps' outputs."""
    return _sd(diffusers.StableDiffusionPipelineSafe)


def tiny_cycle() -> Any:
    """CycleDiffusion: the pipeline hands the scheduler its noise."""
    return _sd(diffusers.CycleDiffusionPipeline)


def tiny_video_zero() -> Any:
    """Text2Video-Zero: several passes, the last one with a copy of the scheduler in its place."""
    return _sd(diffusers.TextToVideoZeroPipeline)


def tiny_bria() -> Any:
    """Bria: asks whether its scheduler's type is exactly the rectified-flow one."""
    transformer = parts.seeded(
        diffusers.BriaTransformer2DModel,
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=[0, 4, 4],
    )
    return diffusers.BriaPipeline(
        transformer=transformer,
        vae=parts.kl(),
        scheduler=tiny.flow(),
        text_encoder=parts.t5(),
        tokenizer=parts.t5_tokenizer(),
    )


def tiny_if_super_resolution() -> Any:
    """DeepFloyd IF, inpainting and enlarging: pixels, and a learned variance in the output's other channels."""
    unet = parts.seeded(
        diffusers.UNet2DConditionModel,
        sample_size=16,
        layers_per_block=1,
        block_out_channels=[8, 16],
        norm_num_groups=4,
        in_channels=6,
        out_channels=6,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        cross_attention_dim=32,
        attention_head_dim=2,
        class_embed_type="timestep",
    )
    schedule = {"beta_schedule": "squaredcos_cap_v2"}
    return diffusers.IFInpaintingSuperResolutionPipeline(
        unet=unet,
        scheduler=diffusers.DDPMScheduler(variance_type="learned_range", **schedule),
        image_noising_scheduler=diffusers.DDPMScheduler(**schedule),
        text_encoder=parts.t5(),
        tokenizer=parts.t5_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
