"""A reward asked about one picture with several prompts: what its wrappers `contrast` and `consistent` share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from tiller.reward_spec import read
from tiller.rewards.call import Reward, flag, relative
from tiller.rewards.contract import score
from tiller.rewards.gradient import differentiable, scores_with_graph
from tiller.rewards.resolve import resolve
from tiller.types import ConfigError, Prompt, Score


@dataclass(frozen=True)
class Variants(ABC):
    """Scores a picture with its prompt and with variants of it, and makes one score of these.

    Raises (when first called):
        ConfigError: the inner reward is unknown, is several, or compares pictures with each other.
    """

    reward: Any = "clip_score"  # the inner reward, as a recipe names one; from Python also the function itself

    @abstractmethod
    def variants(self, metadata: Mapping[str, Any]) -> list[Prompt]:
        """The other prompts to score a picture with."""

    @abstractmethod
    def combined(self, scores: Tensor, prompts: Sequence[str]) -> Tensor:
        """() one score of those (1 + K,) of the prompt and its K variants, whose texts are `prompts`."""

    @property
    def differentiable(self) -> bool:
        """With a gradient where the inner reward has one."""
        return differentiable(self._inner)

    @property
    def deterministic(self) -> bool:
        """Where the inner reward is."""
        return flag(self._inner, "deterministic")

    def __call__(
        self, images: Sequence[Image] | Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[Score] | Tensor:
        rows = [[Prompt(prompt, known), *self.variants(known)] for prompt, known in zip(prompts, metadata, strict=True)]
        owners = [index for index, row in enumerate(rows) for _ in row]
        texts = [prompt.text for row in rows for prompt in row]
        known = [prompt.metadata for row in rows for prompt in row]
        spans = list(pairwise(accumulate((len(row) for row in rows), initial=0)))
        if isinstance(images, Tensor):
            flat = scores_with_graph(self._inner, images[owners], texts, known)
            parts = [(flat[start], self._one(flat[start:end], texts[start:end])) for start, end in spans]
            return torch.stack([first * torch.nan if part is None else part for first, part in parts])
        found = score(self._inner, [images[owner] for owner in owners], texts, known)
        return [self._noted(found.values, found.reasons, texts, start, end) for start, end in spans]

    def _one(self, scores: Tensor, texts: Sequence[str]) -> Tensor | None:
        """None where a score is missing, or there is no variant to compare with."""
        return self.combined(scores, texts) if len(texts) > 1 and scores.isfinite().all() else None

    def _noted(self, values: Any, reasons: Mapping[int, str], texts: Sequence[str], start: int, end: int) -> Score:
        if end - start < 2:
            return Score(None, reason=f"the prompt has no {self.wanted} in its metadata")
        scores = torch.as_tensor(values[start:end])
        note = ", ".join(f"{text}: {value:.4g}" for text, value in zip(texts[start:end], scores.tolist(), strict=True))
        value = self._one(scores, texts[start:end])
        if value is None:
            missing = next(index for index in range(start, end) if index in reasons)
            return Score(None, reason=f"{texts[missing]}: {reasons[missing]}", note=note)
        return Score(float(value), note=note)

    wanted = "variants"
    """What the metadata of a prompt must have."""

    @cached_property
    def _inner(self) -> Reward:
        if callable(self.reward):
            inner = self.reward
        else:
            specs = read(self.reward, "reward.reward")
            if len(specs) != 1:
                raise ConfigError("config error: reward.reward must be one reward, not a list.")
            inner = resolve(specs[0].name, specs[0].settings, specs[0].key)
        if relative(inner):
            raise ConfigError("config error: reward.reward compares pictures with each other; name one that does not.")
        return inner


def listed(entries: Any) -> list[Prompt]:
    """The prompts in a list of texts or of `{"prompt": text, ...}`, whose other keys are their metadata.

    Raises:
        ValueError: it is none.
    """
    prompts = []
    for entry in entries if isinstance(entries, (list, tuple)) else [entries]:
        text = entry.get("prompt") if isinstance(entry, Mapping) else entry
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{entry!r} is no prompt; write a text, or {{'prompt': text}}")
        extra = {key: value for key, value in entry.items() if key != "prompt"} if isinstance(entry, Mapping) else {}
        prompts.append(Prompt(text, extra))
    return prompts
