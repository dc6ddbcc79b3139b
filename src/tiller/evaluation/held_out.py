"""Pictures of a policy as its user would make them, on prompts by split, and their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tiller.distributed import World
from tiller.policy import Policy
from tiller.rewards import Reward, score
from tiller.types import Prompt

SEED_OFFSET = 1_000_003  # evaluation noise is never training noise


@dataclass(frozen=True)
class Evaluated:
    """One model's scores on one split: per reward, one per picture."""

    prompts: tuple[str, ...]  # (N,)
    scores: Mapping[str, np.ndarray]  # reward -> (N,) float64, NaN = missing

    def to_data(self) -> dict[str, Any]:
        """As plain data, for a JSON file; a missing score is null."""
        return {
            "prompts": list(self.prompts),
            "scores": {
                name: [value if np.isfinite(value) else None for value in values.tolist()]
                for name, values in self.scores.items()
            },
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Evaluated:
        """Back from `to_data`."""
        scores = {
            name: np.array([np.nan if value is None else value for value in values], dtype=np.float64)
            for name, values in data["scores"].items()
        }
        return cls(tuple(data["prompts"]), scores)


def draw_pictures(
    policy: Policy,
    prompts: Sequence[Prompt],
    samples_per_prompt: int,
    seed: int,
    batch_size: int,
    sampling: Mapping[str, Any],
    world: World | None = None,
) -> list[Any]:
    """`samples_per_prompt` pictures of each prompt, side by side, drawn by the pipeline's own scheduler."""
    world = world or World()
    asked = [(prompt.text, sample) for prompt in prompts for sample in range(samples_per_prompt)]
    batches = [asked[start : start + batch_size] for start in range(0, len(asked), batch_size)]
    mine = [
        list(
            policy.stock(
                [text for text, _ in batch],
                seed=seed + SEED_OFFSET,
                samples=[sample for _, sample in batch],
                **sampling,
            )
        )
        for batch in world.share(batches)
    ]
    return [picture for pictures in world.gather(mine) for picture in pictures]


def evaluate(
    policy: Policy,
    splits: Mapping[str, Sequence[Prompt]],
    rewards: Mapping[str, Reward],
    samples_per_prompt: int,
    seed: int,
    batch_size: int,
    sampling: Mapping[str, Any],
    world: World | None = None,
) -> dict[str, Evaluated]:
    """Every split's pictures, scored by every reward. The same seed gives every model the same initial noise."""
    results = {}
    for split, prompts in splits.items():
        pictures = draw_pictures(policy, prompts, samples_per_prompt, seed, batch_size, sampling, world)
        results[split] = scored(pictures, prompts, samples_per_prompt, rewards, world)
    return results


def scored(
    pictures: Sequence[Any],
    prompts: Sequence[Prompt],
    samples_per_prompt: int,
    rewards: Mapping[str, Reward],
    world: World | None = None,
) -> Evaluated:
    """The scores of pictures that lie side by side, `samples_per_prompt` of each prompt.

    Where a reward returns named scores, or is a sum, `NAME[PART]` is each of them. One that compares pictures is shown
    the samples of a prompt as a group: its scores rank pictures of one model, and say nothing of one model against
    another. One process asks for all of them, for a judge may not answer twice alike.
    """
    asked = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
    texts, metadata = [prompt.text for prompt in asked], [prompt.metadata for prompt in asked]
    groups = [index for index in range(len(prompts)) for _ in range(samples_per_prompt)]

    def ask() -> dict[str, np.ndarray]:
        scores: dict[str, np.ndarray] = {}
        for name, reward in rewards.items():
            found = score(reward, pictures, texts, metadata, groups=groups)
            scores[name] = found.values
            scores |= {f"{name}[{part}]": column for part, column in found.components.items()}
        return scores

    return Evaluated(tuple(texts), (world or World()).once(ask))
