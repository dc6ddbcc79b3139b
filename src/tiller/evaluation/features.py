"""Features of pictures by a network of transformers: CLIP's embedding, another encoder's, or a classifier's logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from tiller.rewards.loading import folder_of, load_model, load_processor
from tiller.rewards.scorers.clip import Clip
from tiller.rewards.scorers.pixels import rgb


@dataclass(frozen=True)
class Features:
    """Which network, and what of it."""

    model: str  # a folder, a model that comes with tiller, or a name on the hub
    revision: str | None = None
    output: Literal["features", "logits"] = "features"
    device: str = "auto"
    batch_size: int = 32

    @torch.no_grad()
    def __call__(self, images: Sequence[Any]) -> Tensor:
        """(N, D) float32 on the CPU.

        CLIP: the projected embedding, of length 1. Another encoder: its pooled output, or its first token where it has
        none. A classifier: its logits.
        """
        if self.output == "features" and self._kind() == "clip":
            return (
                Clip("features", self.model, self.revision, self.device, batch_size=self.batch_size)
                .pictures(images)
                .cpu()
            )
        auto = AutoModelForImageClassification if self.output == "logits" else AutoModel
        network = load_model(auto, self.model, self.revision, self.device)
        processor = load_processor(AutoImageProcessor, self.model, self.revision, backend="pil")
        pictures, parts = rgb(images, "features"), []
        for start in range(0, len(pictures), self.batch_size):
            pixels = processor(images=pictures[start : start + self.batch_size], return_tensors="pt")["pixel_values"]
            answer = network(pixel_values=pixels.to(network.device, network.dtype))
            parts.append(self._read(answer).float().cpu())
        return torch.cat(parts)

    def _read(self, answer: Any) -> Tensor:
        if self.output == "logits":
            return answer.logits
        pooled = getattr(answer, "pooler_output", None)
        return (answer.last_hidden_state[:, 0] if pooled is None else pooled).flatten(1)

    def _kind(self) -> str:
        return AutoConfig.from_pretrained(folder_of(self.model, self.revision, weights=False)).model_type
