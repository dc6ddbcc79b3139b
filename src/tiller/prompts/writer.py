"""A language model that writes: in this process, or behind an OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from tiller.rewards.loading import load_model, load_processor
from tiller.rewards.serving.chat import ChatModel
from tiller.rewards.serving.persistence import Failure
from tiller.types import ConfigError


class Writer(Protocol):
    """Anything that answers requests in words, such as `LocalWriter` or `ChatModel`."""

    def ask(self, images: None, questions: Sequence[str]) -> list[str | Failure]:
        """One answer per request, in order."""
        ...


@dataclass(frozen=True)
class LocalWriter:
    """A causal language model of transformers, asked through its tokenizer's chat template.

    A request is answered with random numbers of its own, so what is written depends on the seed and on how often
    the same writer was asked before, and on nothing else.
    """

    model: str
    revision: str | None = None
    seed: int = 0
    temperature: float = 1.0  # 0 always takes the likeliest word
    top_p: float = 0.95
    max_new_tokens: int = 512
    device: str = "auto"
    dtype: str = "auto"

    def ask(self, images: None, questions: Sequence[str]) -> list[str | Failure]:
        """One answer per request, one after the other."""
        return [self._answer(question) for question in questions]

    @torch.no_grad()
    def _answer(self, question: str) -> str:
        tokenizer, model, asked = self._parts
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(model.device)
        drawn: dict[str, Any] = {"do_sample": self.temperature > 0}
        if self.temperature > 0:
            drawn |= {"temperature": self.temperature, "top_p": self.top_p}
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed * 1_000_003 + len(asked))
            written = model.generate(**inputs, max_new_tokens=self.max_new_tokens, **drawn)
        asked.append(question)
        return tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    @cached_property
    def _parts(self) -> tuple[Any, Any, list[str]]:
        """The tokenizer, the model, and what it has been asked."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = load_processor(AutoTokenizer, self.model, self.revision)
        if not tokenizer.chat_template:
            raise ConfigError(f"{self.model} has no chat template, so it cannot be asked; name a chat model.")
        return tokenizer, load_model(AutoModelForCausalLM, self.model, self.revision, self.device, self.dtype), []


def make_writer(
    model: str, revision: str | None, url: str | None, token_env: str | None, seed: int, temperature: float
) -> Writer:
    """The writer that settings name: behind `url` if there is one, else in this process."""
    if url is None:
        return LocalWriter(model, revision, seed, temperature)
    return ChatModel(url, model, token_env, temperature=temperature, max_tokens=512)
