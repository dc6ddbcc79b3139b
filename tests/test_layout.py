"""Cheaper calls: which denoisers they are for, and that results differ by rounding only."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

import tiny
from tiller.policy import layout


def kinds(unet: Any) -> set[type]:
    return {type(processor) for processor in unet.attn_processors.values()}


def test_a_small_unet_gives_the_same_with_plain_attention_and_channels_last() -> None:
    unet = tiny.tiny_sd().unet
    torch.manual_seed(0)
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, unet.config.cross_attention_dim)
    with torch.no_grad():
        before = unet(latents, 500, encoder_hidden_states=text).sample
        layout.plain_attention(unet, bfloat16=False)
        layout.channels_last(unet)
        after = unet(latents, 500, encoder_hidden_states=text).sample
    assert kinds(unet) == {AttnProcessor}
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)


def test_large_unets_and_transformers_keep_the_fused_kernel() -> None:
    unet = tiny.tiny_sd().unet
    unet.register_to_config(sample_size=16)  # 256 tokens
    layout.plain_attention(unet, bfloat16=False)
    assert kinds(unet) == {AttnProcessor2_0}
    layout.plain_attention(unet, bfloat16=True)
    assert kinds(unet) == {AttnProcessor}
    transformer = tiny.tiny_sd3().transformer
    before = kinds(transformer)
    layout.plain_attention(transformer, bfloat16=True)
    assert kinds(transformer) == before
