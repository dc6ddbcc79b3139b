"""Settings of `tiller pretrain`. The defaults are the run that made the shipped model."""

from __future__ import annotations

import math
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
class FlowConfig:
    """A transformer on text and latents together, which learns rectified flow (velocity eps - x0)."""

    width: int = 256
    layers: int = 8
    head_width: int = 64
    patch: int = 2  # latents along each side of one token
    time_width: int = 32  # of the vector that holds the noise level
    sigmas: Literal["uniform", "logit_normal"] = "logit_normal"  # how noise levels are drawn

    def __post_init__(self) -> None:
        if min(self.width, self.layers, self.head_width, self.patch, self.time_width) < 1:
            raise ConfigError("flow's numbers must be at least 1")
        if self.width % self.head_width or self.head_width % 4:
            raise ConfigError(f"flow.width is {self.width}; it must be a multiple of head_width, and that of 4")


@dataclass(frozen=True)
class DenoiserConfig:
    """A U-Net with cross-attention on a text encoder that is trained with it (v-prediction), or a flow transformer."""

    flow: FlowConfig | None = None  # a transformer in place of the U-Net, whose `channels` and `layers` then are idle
    channels: tuple[int, ...] = (128, 160)
    layers: int = 1
    text_width: int = 192
    text_layers: int = 2  # that are read
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
    """What to learn from, where to write, and the three phases; with `start`, the second of them alone."""

    model: Literal["diffusion"] = "diffusion"  # what is trained; `clip` and `llava` have settings of their own
    output: str = "model"
    data: str = "emoji"  # "emoji", a folder of pictures with captions, or "hub:NAME" of a Hugging Face dataset
    size: int = 64  # pixels
    seed: int = 0
    start: str | None = None  # a pipeline folder, or emoji: its autoencoder and its words, with their vectors
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
        if self.start is not None and (self.autoencoder, self.decoder) != (AutoencoderConfig(), DecoderConfig()):
            raise ConfigError("start brings an autoencoder that stays as it is; leave out autoencoder and decoder")
        if self.denoiser.flow is not None and self.denoiser.channels != DenoiserConfig().channels:
            raise ConfigError("denoiser.channels belongs to the U-Net; leave it out, or leave out denoiser.flow")
        if self.start is None:
            self.check_size(2 ** (len(self.autoencoder.channels) - 1))

    def check_size(self, factor: int) -> int:
        """The side of the latents, the autoencoder making pictures `factor` times smaller.

        Raises:
            ConfigError: autoencoder or denoiser cannot halve pictures of this size as often as they should.
        """
        flow = self.denoiser.flow
        unit = factor * (2 ** (len(self.denoiser.channels) - 1) if flow is None else flow.patch)
        if flow is not None:
            unit = math.lcm(unit, 16)  # which the pipeline asks for
        if self.size <= 0 or self.size % unit:
            raise ConfigError(f"size is {self.size}; with these channels it must be a multiple of {unit}")
        return self.size // factor
