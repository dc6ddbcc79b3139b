"""Which of two pictures people would pick: PickScore (Kirstain et al. 2023, 2305.01569), a CLIP ViT-H/14."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from tiller.rewards.scorers.clip import Clip


@dataclass(frozen=True)
class PickScore:
    """exp(logit_scale) · cos(picture, prompt), near 20; some divide it by 26, which is `weight: 0.0385` in a recipe."""

    deterministic: ClassVar[bool] = True

    model: str = "yuvalkirstain/PickScore_v1"
    revision: str | None = None  # by default the one that tiller pins
    scale: float | None = None  # factor on the cosine; by default the model's own exp(logit_scale)
    differentiable: bool = False  # take pictures as a tensor, return scores with their graph
    device: str = "auto"
    dtype: str = "float32"
    batch_size: int = 16  # pictures per forward

    @cached_property
    def clip(self) -> Clip:
        """The model, loaded at its first use."""
        return Clip("pick_score", self.model, self.revision, self.device, self.dtype, self.batch_size)

    def __call__(
        self, images: Sequence[Any] | Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[float] | Tensor:
        """N scores: a list of PIL pictures', or a tensor of a tensor's."""
        cosines = self.clip.cosines(images, prompts)
        scale = self.clip.network.logit_scale.float().exp().item() if self.scale is None else self.scale
        return cosines * scale if isinstance(images, Tensor) else (cosines * scale).tolist()
