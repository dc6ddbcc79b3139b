"""Settings of the two models that read pictures, `tiller pretrain` with `model: clip` or `model: llava`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tiller.types import ConfigError


@dataclass(frozen=True)
class ClipConfig:
    """A small CLIP on the embedded world. The defaults are the run that made `emoji-clip`."""

    model: Literal["clip"] = "clip"
    output: str = "clip-model"
    start: str | None = None  # a model folder of these sizes, or emoji-clip, whose weights it goes on from
    seed: int = 0
    width: int = 192  # of the vision tower
    layers: int = 3
    patch: int = 16  # pixels along each side of one token
    text_width: int = 96
    text_layers: int = 2
    head_width: int = 32
    joint_width: int = 128  # of the vectors that are compared
    steps: int = 2000
    batch: int = 64
    lr: float = 1e-3
    ema: float = 0.99  # decay of the averaged weights, which are the ones exported
    pool: int = 32_768  # scenes drawn ahead, for the whole training
    coded: float = 0.06  # share of them that passed through the autoencoder of the model emoji
    save_every: int = 200  # steps
    precision: Literal["bf16", "fp32"] = "bf16"
    device: str = "auto"

    def __post_init__(self) -> None:
        require_positive(self, "steps", "batch", "pool", "layers", "text_layers", "head_width", "joint_width")
        for key in ("width", "text_width"):
            if getattr(self, key) < 1 or getattr(self, key) % self.head_width:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must be a multiple of head_width")
        if self.patch < 1 or 64 % self.patch:
            raise ConfigError(f"patch is {self.patch}; it must divide 64")
        if not 0 <= self.coded <= 1:
            raise ConfigError(f"coded is {self.coded}; it is a share, from 0 to 1")


def require_positive(config: object, *keys: str) -> None:
    """Raises ConfigError for the first of these settings that is below 1."""
    for key in keys:
        if getattr(config, key) < 1:
            raise ConfigError(f"{key} must be at least 1")


@dataclass(frozen=True)
class LlavaConfig:
    """A small LLaVA on the embedded world, in three phases. The defaults are the first run of `emoji-llava`."""

    model: Literal["llava"] = "llava"
    output: str = "llava-model"
    clip: str = "emoji-clip"  # whose vision tower it sees through: a folder, or the one that comes with tiller
    start: str | None = None  # a model folder of these sizes, or emoji-llava; then the last phase alone
    seed: int = 0
    width: int = 192  # of the language model
    layers: int = 4
    head_width: int = 32
    language_steps: int = 150  # the language model alone, on text
    projector_steps: int = 150  # the projector alone, on descriptions
    steps: int = 1200  # both, on descriptions and questions
    batch: int = 64
    lr: float = 1.5e-3
    ema: float = 0.99  # decay of the averaged weights, which are the ones exported
    pool: int = 32_768  # scenes drawn ahead, for the whole training
    coded: float = 0.06  # share of them that passed through the autoencoder of the model emoji
    save_every: int = 200  # steps
    precision: Literal["bf16", "fp32"] = "bf16"
    device: str = "auto"

    def __post_init__(self) -> None:
        require_positive(self, "language_steps", "projector_steps", "steps", "batch", "pool", "layers", "head_width")
        if self.width < 1 or self.width % self.head_width:
            raise ConfigError(f"width is {self.width}; it must be a multiple of head_width")
