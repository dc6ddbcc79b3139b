"""Tiny pipelines with random weights, built on the spot: no hub, no files, a few thousand weights each.

`tiny_parts` holds what several pipelines share (tokenizers, text encoders, autoencoders). Every builder is
deterministic: the same call gives the same weights. Pictures are 16x16 or 32x32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch

import tiny_parts as parts

SD_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def scheduler(name: str, **settings: Any) -> Any:
    """A diffusers scheduler by name with Stable Diffusion's noise schedule."""
    return getattr(diffusers, name)(**{**SD_SCHEDULE, **settings})


def ddim(prediction_type: str = "epsilon") -> Any:
    """DDIM as Stable Diffusion ships it."""
    return scheduler("DDIMScheduler", prediction_type=prediction_type, clip_sample=False, set_alpha_to_one=False)


def _sd_parts(prediction_type: str = "epsilon", chosen: Any = None, **unet: Any) -> dict[str, Any]:
    return {
        "unet": parts.unet(**unet),
        "scheduler": chosen or ddim(prediction_type),
        "vae": parts.kl(),
        "text_encoder": parts.clip_text(),
        "tokenizer": parts.clip_tokenizer(),
        "safety_checker": None,
        "feature_extractor": None,
    }


def tiny_sd(prediction_type: str = "epsilon", scheduler: Any = None) -> Any:
    """Stable Diffusion 1.x / 2: U-Net with cross-attention, CLIP text, KL autoencoder; 16x16 pictures."""
    made = _sd_parts(prediction_type, scheduler)
    return diffusers.StableDiffusionPipeline(**made, requires_safety_checker=False)


def tiny_sd_img2img() -> Any:
    """Image to image: the first latents are the noised picture."""
    return diffusers.StableDiffusionImg2ImgPipeline(**_sd_parts(), requires_safety_checker=False)


def tiny_sd_inpaint() -> Any:
    """Inpainting with the nine-channel U-Net: latents, mask and masked picture."""
    return diffusers.StableDiffusionInpaintPipeline(**_sd_parts(in_channels=9), requires_safety_checker=False)


def tiny_sd_controlnet() -> Any:
    """ControlNet: a second network in the loop that is not trained."""
    made = _sd_parts()
    net = parts.seeded(diffusers.ControlNetModel.from_unet, made["unet"], conditioning_embedding_out_channels=(8, 16))
    return diffusers.StableDiffusionControlNetPipeline(**made, controlnet=net, requires_safety_checker=False)


def tiny_sdxl(scheduler: Any = None) -> Any:
    """SDXL: two text encoders, size and pooled-text conditioning."""
    return diffusers.StableDiffusionXLPipeline(
        unet=parts.unet(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64,
            use_linear_projection=True,
        ),
        scheduler=scheduler or diffusers.EulerDiscreteScheduler(**SD_SCHEDULE, timestep_spacing="leading"),
        vae=parts.kl(),
        text_encoder=parts.clip_text(),
        tokenizer=parts.clip_tokenizer(),
        text_encoder_2=parts.clip_text(projection=True),
        tokenizer_2=parts.clip_tokenizer(),
    )


def tiny_lcm() -> Any:
    """Latent consistency model: guidance as an embedding, a stochastic scheduler."""
    made = _sd_parts(chosen=diffusers.LCMScheduler(**SD_SCHEDULE, clip_sample=False), time_cond_proj_dim=16)
    return diffusers.LatentConsistencyModelPipeline(**made, requires_safety_checker=False)


def flow(**settings: Any) -> Any:
    """The rectified-flow scheduler."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**settings)


def tiny_flow(scheduler: Any = None) -> Any:
    """Stable Diffusion 3: two CLIP encoders and T5, a joint transformer, rectified flow; 16x16 pictures."""
    transformer = parts.seeded(
        diffusers.SD3Transformer2DModel,
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=scheduler or flow(),
        vae=parts.kl(shift_factor=0.06),
        text_encoder=parts.clip_text(projection=True),
        tokenizer=parts.clip_tokenizer(),
        text_encoder_2=parts.clip_text(projection=True),
        tokenizer_2=parts.clip_tokenizer(),
        text_encoder_3=parts.t5(),
        tokenizer_3=parts.t5_tokenizer(),
    )


tiny_sd3 = tiny_flow


def tiny_flux() -> Any:
    """FLUX.1-dev: packed latents, embedded guidance, shifted time."""
    transformer = parts.seeded(
        diffusers.FluxTransformer2DModel,
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=flow(use_dynamic_shifting=True),
        vae=parts.kl(shift_factor=0.06),
        text_encoder=parts.clip_text(),
        tokenizer=parts.clip_tokenizer(),
        text_encoder_2=parts.t5(),
        tokenizer_2=parts.t5_tokenizer(),
    )


def tiny_pixart() -> Any:
    """PixArt-alpha: T5, a transformer that also predicts a variance, DPM-Solver++."""
    transformer = parts.seeded(
        diffusers.PixArtTransformer2DModel,
        sample_size=4,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        use_additional_conditions=False,
    )
    return diffusers.PixArtAlphaPipeline(
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        vae=parts.kl(),
        text_encoder=parts.t5(),
        tokenizer=parts.t5_tokenizer(),
    )


Call = dict[str, Any]
PROMPT: Call = {"num_inference_steps": 3, "height": 16, "width": 16}


def picture(size: int = 16, batch: int = 1) -> torch.Tensor:
    """(batch, 3, size, size) in [0, 1]."""
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


Builder = Callable[[], Any]
