"""The judge's accuracy on pictures that were spoilt a little: what fools a network pixel by pixel does not outlast it.

tiller evaluate runs/emoji-draft "rewards=[emoji_gold, bench/robust_gold.py:blurred, bench/robust_gold.py:jpeg]"
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from tiller.emoji.judge import gold_accuracy


def _after(spoil: Callable[[Image.Image], Image.Image]) -> Callable[..., Any]:
    return lambda images, prompts, metadata: gold_accuracy([spoil(image) for image in images], prompts, metadata)


def _jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=30)
    return Image.open(buffer).convert("RGB")


def _noise(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image, dtype=np.float64)
    spoilt = pixels + np.random.default_rng(0).normal(0, 12, pixels.shape)
    return Image.fromarray(spoilt.clip(0, 255).round().astype(np.uint8))


blurred = _after(lambda image: image.filter(ImageFilter.GaussianBlur(0.7)))  # radius in pixels, of 64
jpeg = _after(_jpeg)  # quality 30
noisy = _after(_noise)  # normal noise of standard deviation 12, of 255
halved = _after(lambda image: image.resize((32, 32), Image.Resampling.BICUBIC))
