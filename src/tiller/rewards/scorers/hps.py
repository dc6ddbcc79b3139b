"""How much people would like a picture for its prompt: HPSv2 and v2.1 (Wu et al. 2023, 2306.09341), a CLIP ViT-H/14."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from tiller.rewards.loading import fill_model, load_processor, load_tensors
from tiller.rewards.scorers.clip import Clip
from tiller.rewards.scorers.open_clip import from_open_clip
from tiller.types import ConfigError

BASE = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # its configuration and processor; HPS was trained from it


@dataclass(frozen=True)
class HPS:
    """cos(picture, prompt), near .2 to .3, without a temperature. Which version it is, the weights say.

    As HPS was trained, a picture that is not square is not cropped: its longer edge is resized, and black is added.
    The published weights are pickles, which are not read; docs/scorers.md names copies.
    """

    deterministic: ClassVar[bool] = True

    weights: str = ""  # a .safetensors file in open_clip's layout; without one, `model` itself has HPS's weights
    weights_revision: str | None = None  # where they come from the hub
    model: str = BASE
    revision: str | None = None  # of the model; by default the one that tiller pins
    scale: float = 1.0  # factor on the cosine
    differentiable: bool = False  # take pictures as a tensor, return scores with their graph
    device: str = "auto"
    dtype: str = "float32"
    batch_size: int = 16  # pictures per forward

    def __post_init__(self) -> None:
        if not self.weights and self.model == BASE:
            raise ConfigError(
                "the reward hps needs weights, a safetensors file in open_clip's layout (docs/scorers.md names one), "
                "or model, a CLIP of transformers that has HPS's weights."
            )

    @cached_property
    def clip(self) -> Clip:
        """The model, loaded at its first use."""
        own = self._filled if self.weights else None
        sizes = (self.device, self.dtype, self.batch_size)
        return Clip("hps", self.model, self.revision, *sizes, network_of=own, padded=True)

    def _filled(self) -> Any:
        config = load_processor(CLIPConfig, self.model, self.revision)
        tensors = from_open_clip(load_tensors(self.weights, self.weights_revision))
        return fill_model(CLIPModel, config, tensors, self.weights, self.device, self.dtype)

    def __call__(
        self, images: Sequence[Any] | Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[float] | Tensor:
        """N scores: a list of PIL pictures', or a tensor of a tensor's."""
        scores = self.scale * self.clip.cosines(images, prompts)
        return scores if isinstance(images, Tensor) else scores.tolist()
