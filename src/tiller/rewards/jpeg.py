"""How many bytes a picture takes as a JPEG: the first two tasks of Black et al. 2023 (DDPO, arXiv
2305.13301, section 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from PIL.Image import Image


def _kilobytes(image: Image) -> float:
    """Size as a JPEG of quality 95 with PIL's default chroma subsampling (4:2:0), in kB (1000 bytes)."""
    buffer = BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=95)
    return buffer.tell() / 1000


def jpeg_incompressibility(
    images: Sequence[Image], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> np.ndarray:
    """The size of each picture as a JPEG, in kB, shape (N,): pictures gain detail and texture."""
    return np.array([_kilobytes(image) for image in images], dtype=np.float64)


def jpeg_compressibility(
    images: Sequence[Image], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> np.ndarray:
    """The size of each picture as a JPEG, negated, in kB, shape (N,): pictures become plain and smooth."""
    return -jpeg_incompressibility(images, prompts, metadata)
