"""Pictures on their way into a model: PIL to RGB, and the resizing of processors written in torch, with a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tiller.types import RewardError


def rgb(images: Sequence[Any], scorer: str) -> list[Image.Image]:
    """Pictures without their transparency, in the colours that lie under it.

    Raises:
        RewardError: one of them is a video, or no picture.
    """
    for image in images:
        if isinstance(image, Image.Image):
            continue
        if isinstance(image, (list, tuple)) or getattr(image, "ndim", 0) == 4:
            raise RewardError(
                f"{scorer} scores single pictures, but was given a video of {len(image)} frames; score one frame of it "
                "with a function of your own, or choose a reward for videos"
            )
        raise RewardError(f"{scorer} scores PIL pictures, but was given a {type(image).__name__}")
    return [image.convert("RGB") for image in images]


def unit(vectors: Tensor) -> Tensor:
    """(N, D) vectors at length 1, in float32."""
    return F.normalize(vectors.float(), dim=-1)


def resize(pictures: Tensor, height: int, width: int) -> Tensor:
    """Pictures (N, 3, H, W) in [0, 1] at another size: bicubic, antialiased, as PIL does it, but for its rounding.

    Rows first, then columns, and after each what overshoots is cut off. PIL rounds to 8 bits besides: the mean
    difference is below 0.4/255.
    """
    for size in ((pictures.shape[-2], width), (height, width)):
        if pictures.shape[-2:] != size:
            pictures = F.interpolate(pictures, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return pictures


def _resized(image: Image.Image, height: int, width: int) -> Tensor:
    """One PIL picture, resized, as (3, height, width) in [0, 1]."""
    small = image.resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(small, dtype=np.float32) / 255).permute(2, 0, 1)


@dataclass(frozen=True)
class Pixels:
    """What a CLIP-like network wants to see: squares of `side` pixels, normalised per channel."""

    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    short: int = 0  # the shorter edge before the crop; 0 is `side`

    def cropped(self, pictures: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] to (N, 3, side, side): the shorter edge resized to `short`, the middle cut out."""
        return self.normalised(self._middle(resize(pictures, *self._around(*pictures.shape[-2:]))))

    def padded(self, pictures: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] to (N, 3, side, side): the longer edge resized, black added on both sides."""
        pictures = resize(pictures, *self._inside(*pictures.shape[-2:]))
        return self.normalised(self._on_black(pictures))

    def cropped_picture(self, image: Image.Image) -> Tensor:
        """One PIL picture as `cropped` does it, (3, side, side), resized by PIL."""
        height, width = self._around(image.height, image.width)
        return self.normalised(self._middle(_resized(image, height, width)))

    def padded_picture(self, image: Image.Image) -> Tensor:
        """One PIL picture as `padded` does it, (3, side, side), resized by PIL."""
        height, width = self._inside(image.height, image.width)
        return self.normalised(self._on_black(_resized(image, height, width)))

    def normalised(self, pictures: Tensor) -> Tensor:
        """(..., 3, h, w) in [0, 1], less the mean and over the standard deviation of each channel."""
        mean, std = (pictures.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pictures - mean) / std

    def _around(self, height: int, width: int) -> tuple[int, int]:
        """The longer edge cut to whole pixels, as transformers and torchvision do."""
        short, shorter = self.short or self.side, min(height, width)
        return height * short // shorter, width * short // shorter

    def _middle(self, pictures: Tensor) -> Tensor:
        top, left = ((length - self.side) // 2 for length in pictures.shape[-2:])
        return pictures[..., top : top + self.side, left : left + self.side]

    def _inside(self, height: int, width: int) -> tuple[int, int]:
        scale = self.side / max(height, width)
        return max(round(height * scale), 1), max(round(width * scale), 1)

    def _on_black(self, pictures: Tensor) -> Tensor:
        down, right = (self.side - length for length in pictures.shape[-2:])
        return F.pad(pictures, (right // 2, right - right // 2, down // 2, down - down // 2))
