"""Cheaper calls: which denoisers they are for, and that results differ by rounding only."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

import tiny
from tiller import Policy
from tiller.commands import building
from tiller.policy import layout
from tiller.recipe import Model


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


def test_frozen_matrices_cast_once_give_the_bits_that_autocast_gives() -> None:
    policy = Policy(tiny.tiny_sd(), lora_rank=4, mixed_precision="bf16")
    for name, parameter in policy.parameters.items():
        if "lora_B" in name:
            parameter.data.normal_()  # so that the adapters have a say
    call = {"num_inference_steps": 3, "guidance_scale": 3.0, "height": 16, "width": 16}

    def made() -> list[torch.Tensor]:
        rollout = policy.sample(["a cat", "a dog"], **call)
        policy.replay(rollout, lambda step: step.backward(step.log_prob.sum()))
        gradients = [p.grad for p in policy.parameters.values() if p.grad is not None]
        for parameter in policy.parameters.values():
            parameter.grad = None
        return [*rollout.latents, rollout.log_probs, *gradients]

    before = made()
    unet = policy.pipe.unet
    layout.cast_once(unet)
    assert all(torch.equal(one, other) for one, other in zip(before, made(), strict=True))
    types = {name: parameter.dtype for name, parameter in unet.named_parameters()}
    assert types.pop("conv_in.weight") == types.pop("conv_in.bias") == unet.dtype == torch.float32
    for name, dtype in types.items():
        frozen = not ("lora_" in name or "norm" in name)
        assert dtype == (torch.bfloat16 if frozen else torch.float32), name


def test_what_is_trained_and_other_denoisers_are_not_cast() -> None:
    full, other = Policy(tiny.tiny_sd(), lora_rank=None), tiny.tiny_sd3().transformer
    for denoiser in (full.pipe.unet, other):
        layout.cast_once(denoiser)
        assert {parameter.dtype for parameter in denoiser.parameters()} == {torch.float32}


def test_a_compiled_denoiser_is_recorded_and_replayed_as_an_uncompiled_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced but not translated (no compiler needed): what the seam puts in `forward` and what `compile` puts there."""
    tiny.tiny_sd().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    found = []
    for compiled in (False, True):
        model = Model(name=str(tmp_path / "model"), compile=compiled, lora_rank=2, device="cpu")
        policy = building.policy(model, seed=0)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        rollout = policy.sample("a cat", num_inference_steps=2, guidance_scale=1.0)
        ratios: list[float] = []

        def on_step(step: Any, ratios: list[float] = ratios) -> None:
            ratios.append(float((step.log_prob.detach() - step.old_log_prob).abs().max()))
            step.backward(step.log_prob.sum())

        policy.replay(rollout, on_step, steps=[1])
        assert ratios == [0.0]
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs) == compiled
        found.append([rollout.log_probs, *(p.grad for p in policy.parameters.values())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
