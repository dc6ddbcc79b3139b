"""Scenes of the embedded world with their pictures, drawn once for a whole training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor

from tiller import emoji
from tiller.emoji import scenes, wording
from tiller.emoji.scenes import Scene
from tiller.pretrain.data import to_tensor
from tiller.pretrain.training import read_metadata, write_tensors

SIZE = 64  # pixels


class ScenePool:
    """`count` random scenes and their pictures; a function of (count, coded, seed), kept in `path`.

    A share `coded` of the pictures went through the autoencoder of the model `emoji`, its latents a little noisy, so
    that whoever learns from the pool has seen how that model blurs.
    """

    def __init__(self, count: int, coded: float, seed: int, path: Path) -> None:
        self.scenes = [wording.any_scene(np.random.default_rng((seed, i))) for i in range(count)]
        mark = {"count": str(count), "coded": str(coded), "seed": str(seed)}
        if not path.exists() or read_metadata(path) != mark:
            pictures = torch.cat([_drawn(self.scenes[i : i + 512]) for i in range(0, count, 512)])
            _pass_through_autoencoder(pictures, round(coded * count), seed)
            write_tensors(path, {"pictures": pictures}, mark)
        self.pictures = load_file(path)["pictures"]  # (count, 3, 64, 64) uint8

    def batch(self, rng: np.random.Generator, count: int) -> tuple[list[Scene], Tensor]:
        """Random scenes and their pictures (count, 3, 64, 64) float32 in [-1, 1], a part of them spoilt."""
        chosen = rng.integers(len(self.scenes), size=count)
        pictures = self.pictures[torch.from_numpy(chosen)].float().div(127.5).sub(1)
        return [self.scenes[i] for i in chosen], spoilt(pictures, rng)


def spoilt(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    """Shifts pictures (N, 3, H, W) by up to 2 pixels, blurs a quarter, adds noise to another and pales a tenth."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    across, down = rng.integers(5, size=2)
    side = pictures.shape[-1]
    out = F.pad(pictures, (2, 2, 2, 2), mode="replicate")[:, :, down : down + side, across : across + side].clone()
    fate = torch.from_numpy(rng.random(len(out)))
    blurred, noisy, pale = fate < 0.25, (fate > 0.15) & (fate < 0.4), fate > 0.9
    small = F.interpolate(out[blurred], size=int(side * rng.uniform(0.3, 0.9)), mode="bilinear", antialias=True)
    out[blurred] = F.interpolate(small, size=side, mode="bilinear")
    out[pale] = out[pale] * float(rng.uniform(0.6, 1)) + float(rng.uniform(-0.1, 0.2))
    level = float(rng.uniform(0, 0.25))
    out[noisy] += level * torch.randn(out[noisy].shape, generator=generator)
    return out.clamp(-1, 1)


def _drawn(chosen: list[Scene]) -> Tensor:
    """(N, 3, 64, 64) uint8."""
    return to_bytes(to_tensor([scenes.draw(scene, SIZE) for scene in chosen]))


def to_bytes(pictures: Tensor) -> Tensor:
    """Pictures in [-1, 1] as uint8."""
    return pictures.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).contiguous()


@torch.no_grad()
def _pass_through_autoencoder(pictures: Tensor, count: int, seed: int) -> None:
    """Replaces the first `count` of pictures (N, 3, 64, 64) uint8 by what a diffusion model would have decoded."""
    if count == 0:
        return
    vae = AutoencoderKL.from_pretrained(emoji.path("emoji") / "vae", dtype=torch.float32)
    vae.to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, count, 64):
        part = pictures[start : min(start + 64, count)]
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(part.float().div(127.5).sub(1)).latent_dist.mean.float()
            level = 0.4 * torch.rand(len(part), 1, 1, 1, generator=generator)
            output = vae.decode(latents + level * torch.randn(latents.shape, generator=generator)).sample
        part.copy_(to_bytes(output.float()))
