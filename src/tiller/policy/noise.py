"""Noise keyed by (seed, prompt, sample): a picture does not depend on the batch or process it is made in."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def key(*parts: Any) -> int:
    """A 63-bit number from any values that print the same wherever they are equal."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generators(purpose: str, seed: int, prompts: Sequence[str | None], samples: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per sample, for one purpose ("start": the pipeline's own draws, "steps": the actions)."""
    return [
        torch.Generator("cpu").manual_seed(key(purpose, seed, prompt, sample))
        for prompt, sample in zip(prompts, samples, strict=True)
    ]


def standard_normal(like: Tensor, sources: Sequence[torch.Generator]) -> Tensor:
    """z ~ N(0, 1) in float32 of the shape of `like`, each sample's rows from its own generator.

    The first axis may be a multiple of the number of samples (frames folded into the batch). If it is none, all of it
    comes from the first generator.
    """
    rows = len(like)
    if rows % len(sources):
        return torch.randn(like.shape, generator=sources[0]).to(like.device)
    shape = (rows // len(sources), *like.shape[1:])
    return torch.cat([torch.randn(shape, generator=source) for source in sources]).to(like.device)
