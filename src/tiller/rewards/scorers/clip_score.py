"""How well a picture fits its prompt in CLIP's eyes: the cosine of their embeddings (Radford et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from tiller.rewards.scorers.clip import Clip


@dataclass(frozen=True)
class ClipScore:
    """scale · cos(picture, prompt), with CLIP ViT-L/14 by default.

    With the default scale of 1 it is `logits_per_image / 100` of that model, whose learned temperature is 100. It is
    not the CLIPScore of Hessel et al. 2021 (2104.08718), which is 2.5 · max(cos, 0) with ViT-B/32.
    """

    deterministic: ClassVar[bool] = True

    model: str = "openai/clip-vit-large-patch14"
    revision: str | None = None  # by default the one that tiller pins
    scale: float = 1.0  # factor on the cosine
    differentiable: bool = False  # take pictures as a tensor, return scores with their graph
    device: str = "auto"
    dtype: str = "float32"
    batch_size: int = 32  # pictures per forward

    @cached_property
    def clip(self) -> Clip:
        """The model, loaded at its first use."""
        return Clip("clip_score", self.model, self.revision, self.device, self.dtype, self.batch_size)

    def __call__(
        self, images: Sequence[Any] | Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[float] | Tensor:
        """N scores: a list of PIL pictures', or a tensor of a tensor's."""
        scores = self.scale * self.clip.cosines(images, prompts)
        return scores if isinstance(images, Tensor) else scores.tolist()
