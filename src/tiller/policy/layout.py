"""What makes a denoiser's call cheaper and changes its result by rounding only."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn

FEW_TOKENS = {False: 64, True: 256}  # by whether it runs in bfloat16: up to so many latents the fused kernel loses


def channels_last(module: nn.Module) -> None:
    """Convolution weights with their channels last in memory, where the module has any."""
    if any(weight.ndim == 4 for weight in module.parameters()):
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch knows it, its stubs do not


def plain_attention(module: nn.Module, bfloat16: bool) -> None:
    """Attention of a small U-Net on a CPU as two matrix products, where diffusers would take torch's fused kernel.

    The fused CPU kernel is slow for few tokens, its backward pass in bfloat16 above all (docs/performance.md).
    Other denoisers, other devices and processors that someone chose stay as they are.
    """
    if not isinstance(module, UNet2DConditionModel) or module.device.type != "cpu":
        return
    unet: Any = module
    size = unet.config.sample_size or 0
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    fused = all(type(processor) is AttnProcessor2_0 for processor in unet.attn_processors.values())
    if fused and 0 < height * width <= FEW_TOKENS[bfloat16]:
        unet.set_attn_processor(AttnProcessor())


def cast_once(module: nn.Module) -> None:
    """A U-Net's frozen matrices in bfloat16, which is what autocast makes of them at every call: the same bits.

    The first layer stays as it is, for its type is what a pipeline takes for the model's. Layers that are trained, and
    norms, which autocast leaves in float32, stay as well. Other denoisers may switch autocast off inside, so they are
    left alone.
    """
    if not isinstance(module, UNet2DConditionModel):
        return
    first = next(module.parameters())
    for layer in module.modules():
        weights = list(layer.parameters()) if isinstance(layer, (nn.Linear, nn.Conv2d)) else []
        if all(w is not first and not w.requires_grad and w.dtype == torch.float32 for w in weights):
            for weight in weights:
                weight.data = weight.data.to(torch.bfloat16)
