"""More tiny pipelines: language models as text encoders, audio, pipelines in pipelines."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

import tiny
import tiny_parts as parts
from tiny import flow


def tiny_sana() -> Any:
    """Sana: linear attention, a deep-compression autoencoder, Gemma."""
    transformer = parts.seeded(
        diffusers.SanaTransformer2DModel,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=8,
    )
    autoencoder = parts.seeded(
        diffusers.AutoencoderDC,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
    )
    config = transformers.Gemma2Config(
        vocab_size=300,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    return diffusers.SanaPipeline(
        transformer=transformer,
        vae=autoencoder,
        scheduler=flow(shift=7.0),
        text_encoder=parts.seeded(transformers.Gemma2Model, config),
        tokenizer=parts.qwen_tokenizer(),
    )


def tiny_qwen_image() -> Any:
    """Qwen-Image: a vision-language text encoder, a video autoencoder, true guidance by two calls."""
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        "vocab_size": 300,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    transformer = parts.seeded(
        diffusers.QwenImageTransformer2DModel,
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    autoencoder = parts.seeded(
        diffusers.AutoencoderKLQwenImage,
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return diffusers.QwenImagePipeline(
        transformer=transformer,
        vae=autoencoder,
        scheduler=flow(use_dynamic_shifting=True, shift_terminal=0.02),
        text_encoder=parts.seeded(transformers.Qwen2_5_VLForConditionalGeneration, config),
        tokenizer=parts.qwen_tokenizer(),
    )


def tiny_z_image() -> Any:
    """Z-Image: prompts of their own lengths in lists, a velocity that points to the data."""
    config = transformers.Qwen3Config(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=300,
        head_dim=8,
    )
    transformer = parts.seeded(
        diffusers.ZImageTransformer2DModel,
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    return diffusers.ZImagePipeline(
        transformer=transformer,
        vae=parts.kl(shift_factor=0.06),
        scheduler=flow(),
        text_encoder=parts.seeded(transformers.Qwen3Model, config),
        tokenizer=parts.qwen_tokenizer("{% for message in messages %}{{ message['content'] }}{% endfor %}"),
    )


def tiny_stable_audio() -> Any:
    """Stable Audio: sound, a preconditioned (EDM) solver, a projection of text and seconds that runs once."""
    transformer = parts.seeded(
        diffusers.StableAudioDiTModel,
        sample_size=4,
        in_channels=3,
        num_layers=1,
        attention_head_dim=4,
        num_key_value_attention_heads=2,
        out_channels=3,
        cross_attention_dim=4,
        time_proj_dim=8,
        global_states_input_dim=8,
        cross_attention_input_dim=4,
        num_attention_heads=2,
    )
    autoencoder = parts.seeded(
        diffusers.AutoencoderOobleck,
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    projection = parts.seeded(
        diffusers.StableAudioProjectionModel, text_encoder_dim=32, conditioning_dim=4, min_value=0, max_value=32
    )
    return diffusers.StableAudioPipeline(
        transformer=transformer,
        vae=autoencoder,
        projection_model=projection,
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(prediction_type="v_prediction", sigma_data=1.0),
        **parts.t5_pair(),
    )


def tiny_kandinsky() -> Any:
    """Kandinsky 2.2, combined: a prior pipeline that makes an image embedding, inside a pipeline that decodes it."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        intermediate_size=16,
        patch_size=4,
    )
    unet = parts.unet(
        out_channels=8,
        addition_embed_type="image",
        encoder_hid_dim=16,
        encoder_hid_dim_type="image_proj",
    )
    movq = parts.seeded(
        diffusers.VQModel,
        block_out_channels=[8, 16],
        down_block_types=["DownEncoderBlock2D", "DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D", "UpDecoderBlock2D"],
        latent_channels=4,
        norm_num_groups=4,
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )
    prior = parts.seeded(
        diffusers.PriorTransformer, num_attention_heads=2, attention_head_dim=8, embedding_dim=16, num_layers=1
    )
    scheduler = diffusers.UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0
    )
    return diffusers.KandinskyV22CombinedPipeline(
        unet=unet,
        scheduler=tiny.ddim(),
        movq=movq,
        prior_prior=prior,
        prior_image_encoder=parts.seeded(transformers.CLIPVisionModelWithProjection, vision),
        prior_text_encoder=parts.clip_text(projection=True),
        prior_tokenizer=parts.clip_tokenizer(),
        prior_scheduler=scheduler,
        prior_image_processor=transformers.CLIPImageProcessor(),
    )
