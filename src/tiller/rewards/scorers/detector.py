"""Where things are in a picture, by an open-vocabulary detector of transformers: OWLv2, Grounding DINO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

from tiller.rewards.loading import kind_of, load_model, load_processor
from tiller.rewards.scorers.clauses import Detection
from tiller.rewards.scorers.reader import HOLE

FLOOR = 0.01  # boxes below this are never asked for


@dataclass(frozen=True)
class Detector:
    """One such model with its processor; nothing is loaded before it is needed."""

    model: str
    revision: str | None = None
    query: str = ""  # what it is asked, with {} for the class; by default what its architecture was trained with
    device: str = "auto"
    dtype: str = "float32"
    batch_size: int = 8

    @cached_property
    def network(self) -> Any:
        """The model, frozen."""
        return load_model(AutoModelForZeroShotObjectDetection, self.model, self.revision, self.device, self.dtype)

    @cached_property
    def processor(self) -> Any:
        """The model's own, resizing with PIL."""
        return load_processor(AutoProcessor, self.model, self.revision, backend="pil")

    @cached_property
    def wording(self) -> str:
        """The query, with {} for the class."""
        return self.query or ("a photo of a {}" if kind_of(self.model, self.revision).startswith("owl") else HOLE)

    @torch.no_grad()
    def find(self, images: Sequence[Image.Image], classes: Sequence[str]) -> list[list[Detection]]:
        """All boxes in each picture that may be of its class, each class asked for on its own."""
        found: list[list[Detection]] = []
        for i in range(0, len(images), self.batch_size):
            pictures, names = images[i : i + self.batch_size], classes[i : i + self.batch_size]
            inputs = self.processor(
                images=list(pictures),
                text=[[self.wording.replace(HOLE, name)] for name in names],
                padding=True,
                return_tensors="pt",
            ).to(self.network.device)
            inputs["pixel_values"] = inputs["pixel_values"].to(self.network.dtype)
            sizes = [(picture.height, picture.width) for picture in pictures]
            boxed = self.processor.post_process_grounded_object_detection(
                self.network(**inputs), threshold=FLOOR, target_sizes=sizes
            )
            for one in boxed:
                rows = zip(one["boxes"].float().tolist(), one["scores"].float().tolist(), strict=True)
                found.append([Detection(tuple(box), score) for box, score in rows])
        return found
