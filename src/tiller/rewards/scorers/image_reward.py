"""How much people would like a picture for its prompt: ImageReward (Xu et al. 2023, 2304.05977), a BLIP with a head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoTokenizer, BlipTextModel, BlipVisionModel

from tiller.rewards.loading import fill_model, load_processor, load_tensors
from tiller.rewards.scorers.aesthetic import apply_head, head_layers
from tiller.rewards.scorers.blip import Blip, from_blip
from tiller.rewards.scorers.pixels import Pixels, rgb
from tiller.types import ConfigError

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw scores, by the authors
LENGTH = 35  # tokens of a prompt, filled up to it or cut
PIXELS_MEAN, PIXELS_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageReward:
    """(head(first state of the text that looked at the picture) - .16717) / 1.03334, so about 0 ± 1.

    The head is five linear layers without activations between them. The published checkpoint is a pickle, which is not
    read; docs/scorers.md names a copy. Its keys are `blip.visual_encoder.*`, `blip.text_encoder.*` and `mlp.layers.*`.
    """

    deterministic: ClassVar[bool] = True

    weights: str = ""  # a .safetensors file with the checkpoint's own keys
    weights_revision: str | None = None  # where they come from the hub
    tokenizer: str = "google-bert/bert-base-uncased"
    tokenizer_revision: str | None = None  # by default the one that tiller pins
    differentiable: bool = False  # take pictures as a tensor, return scores with their graph
    device: str = "auto"
    dtype: str = "float32"
    batch_size: int = 16  # pictures per forward

    def __post_init__(self) -> None:
        if not self.weights:
            raise ConfigError(
                "the reward image_reward needs weights, a safetensors file with the keys of its checkpoint "
                "(docs/scorers.md names one)."
            )

    @cached_property
    def network(self) -> tuple[Any, Any, list[tuple[Tensor, Tensor]]]:
        """What sees, what reads, and the head's layers; frozen."""
        tensors = load_tensors(self.weights, self.weights_revision)
        blip: Blip = from_blip(tensors)
        rest = (self.weights, self.device, self.dtype)
        eyes = fill_model(BlipVisionModel, blip.vision_config, blip.vision, *rest)
        text = fill_model(BlipTextModel, blip.text_config, blip.text, *rest, add_pooling_layer=False)
        head = head_layers({key: value for key, value in tensors.items() if key.startswith("mlp.")}, self.weights)
        return eyes, text, [(weight.to(eyes.device), bias.to(eyes.device)) for weight, bias in head]

    @cached_property
    def words(self) -> Any:
        """BERT's tokenizer."""
        return load_processor(AutoTokenizer, self.tokenizer, self.tokenizer_revision)

    def __call__(
        self, images: Sequence[Any] | Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[float] | Tensor:
        """N scores: a list of PIL pictures', or a tensor of a tensor's."""
        pixels = Pixels(self.network[0].config.image_size, PIXELS_MEAN, PIXELS_STD)
        if isinstance(images, Tensor):
            parts = [
                self._scores(pixels.cropped(part), prompts[at * self.batch_size :][: self.batch_size])
                for at, part in enumerate(images.float().split(self.batch_size))
            ]
            return torch.cat(parts).to(images.device)
        pictures = [pixels.cropped_picture(image) for image in rgb(images, "image_reward")]
        scores: list[float] = []
        with torch.no_grad():
            for i in range(0, len(pictures), self.batch_size):
                part = slice(i, i + self.batch_size)
                scores += self._scores(torch.stack(pictures[part]), prompts[part]).tolist()
        return scores

    def _scores(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) scores of normalised pictures (B, 3, side, side), with their graph."""
        eyes, text, head = self.network
        seen = eyes(pixels.to(eyes.device, eyes.dtype)).last_hidden_state  # (B, patches + 1, D)
        tokens = self.words(
            list(prompts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        ).to(eyes.device)
        states = text(
            tokens["input_ids"], attention_mask=tokens["attention_mask"], encoder_hidden_states=seen
        ).last_hidden_state
        return (apply_head(head, states[:, 0].float()) - MEAN) / STD
