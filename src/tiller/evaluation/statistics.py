"""What pictures look like whatever they show: four numbers whose drift tells of artefacts and of emptied pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

STATISTICS = ("edges", "entropy", "saturation", "blank")
BLOCK = 8  # pixels
FLAT = 2 / 255  # standard deviation below which a block counts as blank


def statistics(picture: Image.Image) -> dict[str, float]:
    """Four numbers of one picture.

    edges: mean length of the gradient of the luminance (central differences, luminance in [0, 1], per pixel).
    entropy: of the histogram of the luminance in 256 bins, in bits, 0 to 8.
    saturation: mean of (max - min)/max over the colour channels; 0 where a pixel is black.
    blank: share of 8x8 blocks whose luminance has a standard deviation below 2/255.
    """
    colours = np.asarray(picture.convert("RGB"), np.float64) / 255
    light = colours @ (0.299, 0.587, 0.114)  # ITU-R BT.601
    down, right = np.gradient(light)
    counts = np.bincount(np.round(light * 255).astype(int).ravel(), minlength=256)
    shares = counts[counts > 0] / counts.sum()
    most, least = colours.max(2), colours.min(2)
    return {
        "edges": float(np.hypot(down, right).mean()),
        "entropy": float(-(shares * np.log2(shares)).sum()) + 0.0,
        "saturation": float(np.divide(most - least, most, out=np.zeros_like(most), where=most > 0).mean()),
        "blank": float((_blocks(light).std((1, 2)) < FLAT).mean()),
    }


def mean_statistics(pictures: Sequence[Image.Image]) -> Mapping[str, float]:
    """The mean of each number over pictures; nothing where there are none, or where they are no still pictures."""
    found = [statistics(picture) for picture in pictures if isinstance(picture, Image.Image)]
    return {name: float(np.mean([one[name] for one in found])) for name in STATISTICS} if found else {}


def _blocks(light: np.ndarray) -> np.ndarray:
    """(blocks, 8, 8) of a luminance (H, W); what is over at the right and at the bottom is left out."""
    size = min(BLOCK, *light.shape)
    high, wide = (length // size for length in light.shape)
    cut = light[: high * size, : wide * size].reshape(high, size, wide, size)
    return cut.transpose(0, 2, 1, 3).reshape(-1, size, size)
