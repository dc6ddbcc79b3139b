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

    Raises:
        RewardError: the reward returned anything but one number per picture with a graph.
    """
    scores = reward(pictures, list(prompts), list(metadata))
    name = getattr(reward, "__name__", type(reward).__name__)
    if not isinstance(scores, Tensor) or scores.shape != (len(prompts),):
        raise RewardError(
            f"reward {name} must return a tensor of shape ({len(prompts)},), one number per picture, to be "
            "differentiated."
        )
    if not scores.requires_grad:
        raise RewardError(
            f"reward {name} has no gradient with respect to the pictures; compute it with torch alone, and detach "
            "nothing."
        )
    return scores
