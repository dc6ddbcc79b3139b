"""The KL autoencoder: pictures (B, 3, H, W) in [-1, 1] to latents of zero mean and unit variance, and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from tiller.pretrain.config import AutoencoderConfig


def build(config: AutoencoderConfig, size: int) -> AutoencoderKL:
    """An untrained autoencoder that halves the picture `len(channels) - 1` times."""
    levels = len(config.channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.channels,
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=8,
        sample_size=size,
        scaling_factor=1.0,
    ).to(memory_format=torch.channels_last)


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 + L2 of pixels plus L1 of their horizontal and vertical differences at three scales; () float32."""
    error = output.float() - target
    loss = error.abs().mean() + error.square().mean()
    for _ in range(3):
        loss = loss + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        error = F.avg_pool2d(error, 2)
    return loss


def autoencoder_loss(vae: AutoencoderKL, pictures: Tensor, noise: Tensor, kl: float) -> Tensor:
    """Reconstruction from one draw of the posterior, plus `kl` times the KL divergence per latent element; ()."""
    posterior = vae.encode(pictures).latent_dist
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    output = vae.decode(mean + noise * (0.5 * logvar).exp()).sample
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return reconstruction_loss(output, pictures) + kl * divergence


@torch.no_grad()
def standardise(vae: AutoencoderKL, latents: Tensor) -> None:
    """Folds each channel's mean and standard deviation into the two 1x1 convolutions around the latents.

    `latents` (N, C, h, w) are posterior means of many pictures; afterwards such means have mean 0, variance 1.
    """
    mean = latents.float().mean((0, 2, 3))  # (C,)
    std = latents.float().std((0, 2, 3))
    channels = len(mean)
    weights: dict[str, Tensor] = dict(vae.named_parameters())
    weights["quant_conv.weight"][:channels] /= std[:, None, None, None]
    bias = weights["quant_conv.bias"]  # (2 C,): of the means, then of the log-variances
    bias[:channels] = (bias[:channels] - mean) / std
    bias[channels:] -= 2 * std.log()
    outer = weights["post_quant_conv.weight"]  # (C, C, 1, 1)
    weights["post_quant_conv.bias"] += (outer[:, :, 0, 0] * mean).sum(1)
    outer *= std[None, :, None, None]
