"""CLIP as the scorers use it: pictures and texts to vectors of length 1, also with a gradient to the pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from tiller.rewards.loading import load_model, load_processor
from tiller.rewards.scorers.pixels import Pixels, rgb, unit


@dataclass(frozen=True)
class Clip:
    """A CLIP model of transformers with its processor; nothing is loaded before it is needed.

    Pictures as PIL images go through the model's own image processor. Pictures as a tensor (N, 3, H, W) in [0, 1] are
    resized in torch, so that the vectors carry their graph.
    """

    scorer: str  # who asks, for messages
    model: str
    revision: str | None = None
    device: str = "auto"
    dtype: str = "float32"
    batch_size: int = 32
    network_of: Callable[[], Any] | None = None  # another way to get the CLIPModel
    padded: bool = False  # black borders in place of a crop

    @cached_property
    def network(self) -> Any:
        """The `CLIPModel`, frozen."""
        if self.network_of is not None:
            return self.network_of()
        return load_model(CLIPModel, self.model, self.revision, self.device, self.dtype)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own."""
        return load_processor(AutoTokenizer, self.model, self.revision)

    @cached_property
    def image_processor(self) -> Any:
        """The model's own, resizing with PIL."""
        return load_processor(AutoImageProcessor, self.model, self.revision, backend="pil")

    @cached_property
    def pixels(self) -> Pixels:
        """The image processor's numbers."""
        held = self.image_processor
        mean, std = tuple(held.image_mean), tuple(held.image_std)
        return Pixels(held.crop_size["height"], mean, std, short=held.size["shortest_edge"])

    def pictures(self, images: Sequence[Any] | Tensor) -> Tensor:
        """(N, D) vectors of length 1, float32, on the model's device; of a tensor with their graph."""
        if isinstance(images, Tensor):
            shape = self.pixels.padded if self.padded else self.pixels.cropped
            return self._vectors(shape(part) for part in images.float().split(self.batch_size))
        pictures = rgb(images, self.scorer)
        parts = (pictures[i : i + self.batch_size] for i in range(0, len(pictures), self.batch_size))
        with torch.no_grad():
            return self._vectors(self._processed(part) for part in parts)

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """(N, D) vectors of length 1, float32; a prompt that occurs often is encoded once, one too long is cut."""
        different = list(dict.fromkeys(prompts))
        limit = min(self.network.config.text_config.max_position_embeddings, self.tokenizer.model_max_length)
        vectors = []
        for i in range(0, len(different), self.batch_size):
            tokens = self.tokenizer(
                different[i : i + self.batch_size], padding=True, truncation=True, max_length=limit, return_tensors="pt"
            ).to(self.network.device)
            features = self.network.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"])
            vectors.append(features.pooler_output)
        rows = [different.index(prompt) for prompt in prompts]
        return unit(torch.cat(vectors))[rows]

    def cosines(self, images: Sequence[Any] | Tensor, prompts: Sequence[str]) -> Tensor:
        """(N,) cosines between each picture and its own prompt; where pictures are a tensor, on its device."""
        seen = self.pictures(images)
        cosine = (seen * self.texts(prompts)).sum(-1)
        return cosine.to(images.device) if isinstance(images, Tensor) else cosine

    def _processed(self, pictures: Sequence[Image.Image]) -> Tensor:
        if self.padded:
            return torch.stack([self.pixels.padded_picture(picture) for picture in pictures])
        return self.image_processor(images=list(pictures), return_tensors="pt")["pixel_values"]

    def _vectors(self, batches: Iterator[Tensor]) -> Tensor:
        network = self.network
        return unit(
            torch.cat([network.get_image_features(b.to(network.device, network.dtype)).pooler_output for b in batches])
        )
