"""Evaluations during a run: a few prompts of every split, the same ones with the same noise from step 0 on."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tiller.distributed import World
from tiller.evaluation.drift import kl_to_base, spread, thumbnails
from tiller.evaluation.held_out import Evaluated, draw_pictures, scored
from tiller.evaluation.monitor import Seen
from tiller.evaluation.paired import Comparison, compare
from tiller.evaluation.statistics import mean_statistics
from tiller.policy import Policy
from tiller.rewards import Reward
from tiller.types import Prompt

TRAINED = "trained"  # the split of the prompts that are trained on
PER_PROMPT = 2  # pictures, so that they can differ


@dataclass(frozen=True)
class Look:
    """What one model's pictures came to."""

    scores: Mapping[str, Evaluated]  # by split; a sum's parts beside it, as REWARD[PART]
    statistics: Mapping[str, float]  # of all splits together
    diversity: float
    vectors: np.ndarray  # (N, D) float32 of all still pictures, whose distances count

    def to_data(self) -> dict[str, Any]:
        """As plain data, for a JSON file."""
        scores = {split: found.to_data() for split, found in self.scores.items()}
        data = base64.b64encode(self.vectors.astype("<f4").tobytes()).decode()
        vectors = {"shape": list(self.vectors.shape), "float32": data}
        return {
            "scores": scores,
            "statistics": dict(self.statistics),
            "diversity": self.diversity if np.isfinite(self.diversity) else None,
            "vectors": vectors,
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Look:
        """Back from `to_data`."""
        scores = {split: Evaluated.from_data(found) for split, found in data["scores"].items()}
        vectors = np.frombuffer(base64.b64decode(data["vectors"]["float32"]), "<f4").reshape(data["vectors"]["shape"])
        differ = float("nan") if data["diversity"] is None else data["diversity"]
        return cls(scores, data["statistics"], differ, vectors)


def evenly(prompts: Sequence[Prompt], pictures: int) -> list[Prompt]:
    """As many prompts, evenly spread, as make about that many pictures; at least one, at most all."""
    count = min(len(prompts), max(1, pictures // PER_PROMPT))
    return [prompts[index * len(prompts) // count] for index in range(count)]


@dataclass(frozen=True)
class InRun:
    """What is looked at during a run, and how."""

    policy: Policy
    splits: Mapping[str, Sequence[Prompt]]  # already the few
    rewards: Mapping[str, Reward]
    trained: str | None  # the reward that is optimised
    seed: int
    batch_size: int
    sampling: Mapping[str, Any]  # evaluation's call arguments
    paths: Mapping[str, Any]  # training's, for the distance between paths
    world: World
    describe: Callable[[Sequence[Any]], np.ndarray] = thumbnails  # pictures to (N, D) vectors

    def look(self) -> Look:
        """Draw and score, with the weights as they are."""
        scores, drawn, differ, vectors = {}, [], [], []
        for split, prompts in self.splits.items():
            pictures = draw_pictures(
                self.policy, prompts, PER_PROMPT, self.seed, self.batch_size, self.sampling, self.world
            )
            scores[split] = scored(pictures, prompts, PER_PROMPT, self.rewards, self.world)
            if mean_statistics(pictures[:1]):
                vectors.append(self.describe(pictures))
                differ.append(spread(vectors[-1], PER_PROMPT))
                drawn += pictures
        whole = np.concatenate(vectors) if vectors else np.zeros((0, 0), np.float32)
        return Look(scores, mean_statistics(drawn), float(np.mean(differ)) if differ else float("nan"), whole)

    def base(self, file: Path) -> Look:
        """The same of the model before training: looked at once, and kept in `file`."""
        if file.exists():
            return Look.from_data(json.loads(file.read_text()))
        with self.policy.base():
            found = self.look()
        if self.world.is_main:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found.to_data()))
        return found

    def compare(self, epoch: int, base: Look, now: Look) -> Seen:
        """Both, beside each other."""
        names = [name for name in base.statistics if name in now.statistics]
        differ = (base.diversity, now.diversity)
        return Seen(
            epoch,
            compared=pooled(base.scores, now.scores),
            trained=self.trained,
            statistics={name: (base.statistics[name], now.statistics[name]) for name in names},
            diversity=differ if np.isfinite(differ).all() else None,
            distance=float(np.linalg.norm(base.vectors - now.vectors, axis=1).mean()) if len(now.vectors) else None,
            kl=self._moved(),
        )

    def _moved(self) -> float | None:
        """Nats per picture, on the first split; None for a full fine-tuning, which has no base left."""
        if self.policy.lora_rank is None:
            return None
        prompts = list(next(iter(self.splits.values())))
        return self.world.once(lambda: kl_to_base(self.policy, prompts, 1, self.seed, self.paths))


def pooled(base: Mapping[str, Evaluated], now: Mapping[str, Evaluated]) -> dict[str, Comparison]:
    """Every reward over the pictures of all held-out splits together, or of the trained one where it is the only one.

    A reward that has no picture with both scores is left out.
    """
    splits = [split for split in base if split != TRAINED] or list(base)
    found: dict[str, Comparison] = {}
    for name in dict.fromkeys(name for split in splits for name in base[split].scores):
        before, after = (
            np.concatenate([looked[split].scores[name] for split in splits if name in looked[split].scores])
            for looked in (base, now)
        )
        prompts = [prompt for split in splits if name in base[split].scores for prompt in base[split].prompts]
        if (np.isfinite(before) & np.isfinite(after)).any():
            found[name] = compare(before, after, prompts)
    return found


def metrics(seen: Seen, now: Look) -> dict[str, float]:
    """For the log: `eval/SPLIT/REWARD` means, and how far the model has drifted, as `drift/...`."""
    found = {
        f"eval/{split}/{name}": float(np.nanmean(values))
        for split, one in now.scores.items()
        for name, values in one.scores.items()
        if np.isfinite(values).any()
    }
    found |= {f"drift/{name}": values[1] for name, values in seen.statistics.items()}
    if seen.diversity is not None:
        found["drift/diversity"] = seen.diversity[1]
    if seen.distance is not None:
        found["drift/distance"] = seen.distance
    if seen.kl is not None:
        found["drift/kl_to_base"] = seen.kl
    return found


def few(splits: Mapping[str, Sequence[Prompt]], trained: Sequence[Prompt], pictures: int) -> dict[str, list[Prompt]]:
    """The prompts to look at during a run: some of every split, and some of those that are trained on."""
    whole = {TRAINED: trained, **splits} if TRAINED not in splits else splits
    return {split: evenly(prompts, pictures) for split, prompts in whole.items()}
