"""The three phases of pretraining, each a generator of `Progress` over one resumable `Training`.

Every batch is a function of (seed, phase, step) alone, so an interrupted run ends where an uninterrupted one does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor

from tiller.pretrain import autoencoder
from tiller.pretrain.config import PretrainConfig
from tiller.pretrain.data import Source
from tiller.pretrain.denoiser import Denoiser
from tiller.pretrain.flow import FlowDenoiser
from tiller.pretrain.training import Progress, Training, optimise, read_metadata, write_tensors

AUTOENCODER, DENOISER, DECODER, POOL = 1, 2, 3, 4  # keep the phases' random streams apart


def numpy_stream(config: PretrainConfig, phase: int, step: int) -> np.random.Generator:
    """The random choices of one step."""
    return np.random.default_rng((config.seed, phase, step))


def torch_stream(config: PretrainConfig, phase: int, step: int) -> torch.Generator:
    """The noise of one step."""
    return torch.Generator().manual_seed(int(numpy_stream(config, phase + 100, step).integers(2**62)))


class Machine(Protocol):
    """What a model is trained on: part of every configuration of a training."""

    @property
    def device(self) -> str: ...

    @property
    def precision(self) -> str: ...


def device_of(config: Machine) -> torch.device:
    """The device to train on; "auto" is an accelerator where there is one."""
    if config.device != "auto":
        return torch.device(config.device)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def autocast(config: Machine) -> torch.autocast:
    """bf16 matrix products, or nothing."""
    return torch.autocast(device_of(config).type, torch.bfloat16, enabled=config.precision == "bf16")


def train_autoencoder(vae: AutoencoderKL, source: Source, config: PretrainConfig, folder: Path) -> Iterator[Progress]:
    """Encoder and decoder together; at the end latents are standardised."""
    settings = config.autoencoder
    training, device = Training(vae, settings.lr, settings.steps), device_of(config)
    side = config.size // 2 ** (len(settings.channels) - 1)

    def loss(step: int) -> Tensor:
        pictures, _ = source.batch(numpy_stream(config, AUTOENCODER, step), settings.batch)
        shape = (settings.batch, settings.latent_channels, side, side)
        noise = torch.randn(shape, generator=torch_stream(config, AUTOENCODER, step))
        with autocast(config):
            return autoencoder.autoencoder_loss(vae, pictures.to(device), noise.to(device), settings.kl)

    yield from optimise(
        training, loss, "autoencoder", settings.batch, folder / "autoencoder.safetensors", config.save_every
    )
    pictures, _ = source.batch(numpy_stream(config, AUTOENCODER, settings.steps), 1024)
    autoencoder.standardise(vae, encode(vae, pictures, config)[0])


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor, config: PretrainConfig) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the posterior, (N, C, h, w) float32 each."""
    means, stds, device = [], [], device_of(config)
    with autocast(config):
        for chunk in pictures.split(64):
            posterior = vae.encode(chunk.to(device)).latent_dist
            means.append(posterior.mean.float())
            stds.append(posterior.std.float())
    return torch.cat(means), torch.cat(stds)


class Pool:
    """Encoded pictures and their tokens, drawn anew every `epochs` passes; a function of the step alone.

    The last pool is kept in `folder`, so that an interrupted run need not encode it again.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        tokenise: Callable[[list[str]], Tensor],
        source: Source,
        config: PretrainConfig,
        folder: Path,
    ) -> None:
        self.vae, self.tokenise, self.source, self.config = vae, tokenise, source, config
        self.path, self.index = folder / "pool.safetensors", -1

    def fill(self, index: int) -> None:
        """Makes the pool of that index the present one."""
        mark = {"index": str(index), "pool": str(self.config.denoiser.pool), "seed": str(self.config.seed)}
        if not self.path.exists() or read_metadata(self.path) != mark:
            write_tensors(self.path, self._encoded(index), mark)
        held = load_file(self.path)
        self.index, self.means, self.stds = index, held["means"], held["stds"]
        self.tokens, self.nothing = held["tokens"][:-1], held["tokens"][-1]  # (N, L), (L,)

    def _encoded(self, index: int) -> dict[str, Tensor]:
        rng = numpy_stream(self.config, POOL, index)
        means, stds, texts = [], [], []
        for start in range(0, self.config.denoiser.pool, 256):
            count = min(256, self.config.denoiser.pool - start)
            pictures, captions = self.source.batch(rng, count)
            mean, std = encode(self.vae, pictures, self.config)
            means.append(mean.half().cpu())
            stds.append(std.half().cpu())
            texts += captions
        return {
            "means": torch.cat(means).contiguous(),
            "stds": torch.cat(stds).contiguous(),
            "tokens": self.tokenise([*texts, ""]),
        }

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents (B, C, h, w), tokens (B, L), times (B,) in [0, 1), noise (B, C, h, w) of one step."""
        settings = self.config.denoiser
        index = step * settings.batch // (settings.pool * settings.epochs)
        if index != self.index:
            self.fill(index)
        rng = numpy_stream(self.config, DENOISER, step)
        generator = torch_stream(self.config, DENOISER, step)
        chosen = torch.from_numpy(rng.integers(len(self.tokens), size=settings.batch))
        tokens = self.tokens[chosen]
        tokens[torch.from_numpy(rng.random(settings.batch) < settings.drop)] = self.nothing
        mean, std = self.means[chosen].float(), self.stds[chosen].float()
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        # one time from each of B equal parts: the same mean, less variance
        times = torch.from_numpy((np.arange(settings.batch) + rng.random(settings.batch)) / settings.batch)
        return latents, tokens, times, torch.randn(mean.shape, generator=generator)


def train_denoiser(
    model: Denoiser | FlowDenoiser, pool: Pool, config: PretrainConfig, folder: Path
) -> Iterator[Progress]:
    """Denoiser and text encoder together; at the end the model holds the averaged weights."""
    settings = config.denoiser
    training = Training(model, settings.lr, settings.steps, settings.ema)
    device = device_of(config)

    def loss(step: int) -> Tensor:
        latents, tokens, times, noise = (t.to(device) for t in pool.batch(step))
        with autocast(config):
            return model.loss(latents, tokens, times, noise)

    path = folder / "denoiser.safetensors"
    yield from optimise(training, loss, "denoiser", settings.batch, path, config.save_every)
    training.use_average()


def train_decoder(vae: AutoencoderKL, source: Source, config: PretrainConfig, folder: Path) -> Iterator[Progress]:
    """The decoder alone, on slightly noisy latents: it learns to draw what a denoiser only nearly says."""
    settings = config.decoder
    vae.encoder.requires_grad_(False)
    vae.get_submodule("quant_conv").requires_grad_(False)
    training, device = Training(vae, settings.lr, settings.steps), device_of(config)

    def loss(step: int) -> Tensor:
        pictures, _ = source.batch(numpy_stream(config, DECODER, step), settings.batch)
        generator = torch_stream(config, DECODER, step)
        mean, std = encode(vae, pictures, config)
        spread = (std.square() + (settings.noise * torch.rand(len(mean), 1, 1, 1, generator=generator)) ** 2).sqrt()
        latents = mean + spread * torch.randn(mean.shape, generator=generator).to(device)
        with autocast(config):
            return autoencoder.reconstruction_loss(vae.decode(latents).sample, pictures.to(device))

    yield from optimise(training, loss, "decoder", settings.batch, folder / "decoder.safetensors", config.save_every)
