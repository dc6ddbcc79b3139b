"""Rewards with a gradient: they say so (`reward.differentiable = True`) and get tensors in the place of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from tiller.types import RewardError


def differentiable(reward: Any) -> bool:
    """Whether the reward takes tensors (B, C, H, W) in [0, 1] and returns (B,) with their graph."""
    return bool(getattr(reward, "differentiable", False))


def as_tensor(images: Sequence[Image]) -> Tensor:
    """Pictures of one size as (B, 3, H, W) in [0, 1], float32."""
    arrays = [np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def score_with_graph(
    reward: Any, pictures: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> Tensor:
    """(B,) rewards of pictures (B, C, H, W) in [0, 1], with the graph that leads back to them.

    Where the reward returns named tensors, their sum. A score that is not finite is missing: NaN here, and its picture
    gets a gradient of 0, whatever the reward's own graph would say.

    Raises:
        RewardError: the reward failed, or returned anything but one number per picture with a graph.
    """
    name = getattr(reward, "__name__", type(reward).__name__)
    scores = scores_with_graph(reward, pictures, prompts, metadata)
    missing = ~scores.detach().isfinite()
    if not scores.requires_grad and not missing.all():
        raise RewardError(
            f"reward {name} has no gradient with respect to the pictures; compute it with torch alone, and detach "
            "nothing."
        )
    if missing.any() and pictures.requires_grad:
        rows = missing.to(pictures.device).view(-1, *[1] * (pictures.ndim - 1))
        pictures.register_hook(lambda gradient: gradient.masked_fill(rows, 0))
    return scores.masked_fill(missing, torch.nan)


def scores_with_graph(
    reward: Any, pictures: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> Tensor:
    """(B,) what the reward returned, summed over its names; not checked for a gradient, nor for what is missing.

    Raises:
        RewardError: the reward failed, or returned anything but one number per picture.
    """
    name = getattr(reward, "__name__", type(reward).__name__)
    try:
        answer = reward(pictures, list(prompts), list(metadata))
    except RewardError:
        raise  # of a part of it, which is named there
    except Exception as error:
        raise RewardError(
            f"reward {name} failed on {len(prompts)} picture(s) with a gradient: {type(error).__name__}: {error}; mend "
            "it, or return NaN for a picture it cannot score."
        ) from error
    return _total(name, answer, len(prompts))


def _total(name: str, answer: Any, expected: int) -> Tensor:
    """The one tensor that was returned, or the sum of several named ones."""
    parts = list(answer.values()) if isinstance(answer, Mapping) else [answer]
    if not parts or not all(isinstance(part, Tensor) and part.shape == (expected,) for part in parts):
        raise RewardError(
            f"reward {name} must return a tensor of shape ({expected},), one number per picture, to be differentiated."
        )
    return torch.stack(parts).sum(0)
