"""How far training has carried a model from where it was: KL along the path, and how much pictures still differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tiller.evaluation.held_out import SEED_OFFSET, draw_pictures
from tiller.policy import Policy, Step
from tiller.types import Prompt

SIZE = 16  # pixels; finer detail is no difference in content


def kl_to_base(
    policy: Policy, prompts: Sequence[Prompt], samples_per_prompt: int, seed: int, sampling: Mapping[str, Any]
) -> float:
    """KL(p_θ(path), p_base(path)) in nats per picture: the sum over steps of |μ - μ'|²/(2S²), over sampled paths.

    The paths are drawn with the policy's own choice of noise, whatever kernel it was trained with
    (Fan et al. 2023, DPOK, eq. 8, an upper bound of the KL of the pictures).
    """
    texts = [prompt.text for prompt in prompts for _ in range(samples_per_prompt)]
    rollout = policy.sample(texts, seed=seed + SEED_OFFSET, **sampling)
    means: dict[int, Tensor] = {}
    total = torch.zeros(rollout.batch_size, dtype=torch.float64)

    def compare(step: Step) -> None:
        shift = (step.mean - means[step.index]).double() ** 2 / (2 * torch.as_tensor(step.std).double() ** 2)
        total.add_(shift.reshape(rollout.batch_size, -1).sum(1).cpu())

    with torch.no_grad():
        with policy.base():
            policy.replay(rollout, lambda step: means.update({step.index: step.mean}))
        policy.replay(rollout, compare)
    return float(total.mean())


def diversity(pictures: Sequence[Image.Image], samples_per_prompt: int) -> float:
    """Root mean square difference of two pictures of one prompt, in [0, 1], averaged over pairs and prompts.

    `pictures` are `samples_per_prompt` per prompt, side by side; NaN where that is 1.
    """
    return spread(thumbnails(pictures), samples_per_prompt)


def thumbnails(pictures: Sequence[Image.Image]) -> np.ndarray:
    """(N, D) float32 vectors, whose distance is the root mean square difference of two pictures of 16x16 pixels."""
    small = [np.asarray(p.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX), np.float64) for p in pictures]
    return (np.stack(small).reshape(len(small), -1) / (255 * SIZE * 3**0.5)).astype(np.float32)


def spread(vectors: np.ndarray, samples_per_prompt: int) -> float:
    """Mean distance of two pictures of one prompt, of vectors (N, D) that lie side by side; NaN where that is one."""
    groups = [vectors[start : start + samples_per_prompt] for start in range(0, len(vectors), samples_per_prompt)]
    found = [np.linalg.norm(a - b) for group in groups for a, b in combinations(group, 2)]
    return float(np.mean(found)) if found else float("nan")


def drift(
    policy: Policy, prompts: Sequence[Prompt], samples_per_prompt: int, seed: int, sampling: Mapping[str, Any]
) -> dict[str, float]:
    """`kl_to_base` (nats per picture) and `diversity` of the base and of the tuned model, on the same noise.

    Only for policies with adapters: a full fine-tuning has no base left to ask.
    """
    drawn = {}
    for name in ("base", "tuned"):
        batch = (policy, prompts, samples_per_prompt, seed, len(prompts) * samples_per_prompt, sampling)
        if name == "base":
            with policy.base():
                pictures = draw_pictures(*batch)
        else:
            pictures = draw_pictures(*batch)
        drawn[f"diversity_{name}"] = diversity(pictures, samples_per_prompt)
    return {"kl_to_base": kl_to_base(policy, prompts, samples_per_prompt, seed, sampling), **drawn}
