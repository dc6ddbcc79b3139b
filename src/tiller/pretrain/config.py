"""Settings of `tiller pretrain`. The defaults are the run that made the shipped model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tiller.types import ConfigError


@dataclass(frozen=True)
class AutoencoderConfig:
    """A KL autoencoder: each level after the first halves the picture."""

    channels: tuple[int, ...] = (24, 48, 96, 128)
    latent_channels: int = 8
    steps: int = 3200
    batch: int = 16
    lr: float = 1e-3
    kl: float = 5e-4  # weight of the KL divergence, mean over latent elements


@dataclass(frozen=True)
class DenoiserConfig:
    """A U-Net with cross-attention on a text encoder that is trained with it (v-prediction)."""

    channels: tuple[int, ...] = (128, 160)
    layers: int = 1
    text_width: int = 192
    text_layers: int = 2
    steps: int = 5000
    batch: int = 48
    lr: float = 1e-3
    drop: float = 0.1  # share of captions replaced by "", for guidance
    ema: float = 0.998  # decay of the averaged weights, which are the ones exported
    pool: int = 24_000  # pictures encoded ahead; a new pool is drawn after `epochs` passes
    epochs: int = 4


@dataclass(frozen=True)
class DecoderConfig:
    """Last phase: the decoder alone goes on, on latents with a little noise, the encoder stays as it is."""

    steps: int = 1950
    batch: int = 16
    lr: float = 1e-3
    noise: float = 0.15  # standard deviation, in latents of unit variance


@dataclass(frozen=True)
class PretrainConfig:
    """What to learn from, where to write, and the three phases."""

    output: str = "model"
    data: str = "emoji"  # "emoji", a folder of pictures with captions, or "hub:NAME" of a Hugging Face dataset
    size: int = 64  # pixels
    seed: int = 0
    words: int = 4000  # the most frequent words become one token each
    save_every: int = 200  # steps
    precision: Literal["bf16", "fp32"] = "bf16"  # bf16 is autocast: weights stay fp32
    device: str = "auto"  # cpu, cuda ...; auto is an accelerator where there is one
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)

    def __post_init__(self) -> None:
        units = {"autoencoder.channels": 8, "denoiser.channels": 16, "denoiser.text_width": 48}
        for name, unit in units.items():
            section, key = name.split(".")
            value = getattr(getattr(self, section), key)
            widths = value if isinstance(value, tuple) else (value,)
            if not widths or any(width <= 0 or width % unit for width in widths):
                raise ConfigError(f"{name} is {value}; choose multiples of {unit}")
        for section in ("autoencoder", "denoiser", "decoder"):
            for key in ("steps", "batch"):
                if getattr(getattr(self, section), key) < 1:
                    raise ConfigError(f"{section}.{key} must be at least 1")
        levels = len(self.autoencoder.channels) + len(self.denoiser.channels) - 2
        if self.size <= 0 or self.size % 2**levels:
            raise ConfigError(f"size is {self.size}; with these channels it must be a multiple of {2**levels}")
