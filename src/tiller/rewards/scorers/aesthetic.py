"""How beautiful people would find a picture, on a scale of 1 to 10: LAION's head on CLIP ViT-L/14.

The head is Schuhmann's improved aesthetic predictor, sac+logos+ava1-l14-linearMSE: five linear layers without
activations between them, on the embedding at length 1. It is the second task of DDPO (2305.13301, section 5).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from tiller.rewards.loading import load_tensors
from tiller.rewards.scorers.clip import Clip
from tiller.types import ConfigError

_LAYER = re.compile(r"^(?P<prefix>.*?)(?P<index>\d+)\.(?P<part>weight|bias)$")


@dataclass(frozen=True)
class Aesthetic:
    """The predicted mean rating of each picture; prompts play no part.

    `head` is a safetensors file of the head's layers, whose keys end in a layer's number and `.weight` or `.bias`, as
    in `layers.0.weight`. The head's well-known file is a pickle, which is not read.
    """

    deterministic: ClassVar[bool] = True

    head: str = "shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE/model.safetensors"  # or a local file
    head_revision: str | None = None  # a commit on the hub; a local file needs none
    model: str = "openai/clip-vit-large-patch14"
    revision: str | None = None  # of the model; by default the one that tiller pins
    differentiable: bool = False  # take pictures as a tensor, return scores with their graph
    device: str = "auto"
    dtype: str = "float32"
    batch_size: int = 32  # pictures per forward

    @cached_property
    def clip(self) -> Clip:
        """The model, loaded at its first use."""
        return Clip("aesthetic", self.model, self.revision, self.device, self.dtype, self.batch_size)

    @cached_property
    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """The head's layers, float32, on the model's device."""
        found = head_layers(load_tensors(self.head, self.head_revision), self.head)
        width = self.clip.network.config.projection_dim
        if found[0][0].shape[1] != width:
            raise ConfigError(
                f"the head {self.head} takes vectors of {found[0][0].shape[1]} numbers, but {self.model} gives "
                f"{width}; take the head and the model that belong together."
            )
        return [(weight.to(self.clip.network.device), bias.to(self.clip.network.device)) for weight, bias in found]

    def __call__(
        self, images: Sequence[Any] | Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[float] | Tensor:
        """N scores: a list of PIL pictures', or a tensor of a tensor's."""
        scores = apply_head(self.layers, self.clip.pictures(images))
        return scores.to(images.device) if isinstance(images, Tensor) else scores.tolist()


def head_layers(tensors: Mapping[str, Tensor], file: str = "the file") -> list[tuple[Tensor, Tensor]]:
    """The (weight, bias) pairs of the stack of linear layers in a file, in order, as float32.

    Keys may have any prefix and the numbers any gaps (dropout layers have numbers too, but no weights). Of several
    stacks with one prefix each it is the one that ends in a single number; other tensors do not matter.

    Raises:
        ConfigError: there is no such stack.
    """
    stacks: dict[str, dict[int, dict[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        if (match := _LAYER.match(key)) and tensor.ndim == (2 if match["part"] == "weight" else 1):
            stacks.setdefault(match["prefix"], {}).setdefault(int(match["index"]), {})[match["part"]] = tensor.float()
    for stack in stacks.values():
        layers = [stack[index] for index in sorted(stack)]
        if all(len(layer) == 2 for layer in layers) and layers[-1]["weight"].shape[0] == 1:
            widths = [layer["weight"].shape for layer in layers]
            if all(after[1] == before[0] for before, after in pairwise(widths)):
                return [(layer["weight"], layer["bias"]) for layer in layers]
    raise ConfigError(
        f"{file} holds no stack of linear layers down to one number (keys such as layers.0.weight and layers.0.bias); "
        f"it has {', '.join(list(tensors)[:3]) or 'nothing'}."
    )


def apply_head(layers: Sequence[tuple[Tensor, Tensor]], vectors: Tensor) -> Tensor:
    """(N, D) vectors through linear layers without activations between them, (N,)."""
    for weight, bias in layers:
        vectors = F.linear(vectors, weight, bias)
    return vectors.squeeze(-1)
