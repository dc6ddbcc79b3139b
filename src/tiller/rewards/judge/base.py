"""What rewards that ask a vision-language model have in common: whom they ask, and the check for written words."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from PIL.Image import Image

from tiller.rewards.judge.local import LocalViewer
from tiller.rewards.judge.viewer import Failure, Viewer, checked
from tiller.rewards.judge.written import Veto
from tiller.rewards.serving.chat import ChatModel
from tiller.rewards.serving.persistence import Persistence
from tiller.types import Score


@dataclass(frozen=True)
class VisionJudge(ABC):
    """Asks a vision-language model about pictures, here or behind an OpenAI-compatible server."""

    model: str = "llava-hf/llava-1.5-7b-hf"  # a folder, a name on the hub, or the server's name for it
    revision: str | None = None  # of a hub model
    url: str | None = None  # of a server that has the model, such as http://127.0.0.1:8000/v1; None: in this process
    token_env: str | None = None  # the environment variable that holds the server's token
    concurrency: int = 4  # requests to the server at once
    template: str | None = None  # how to ask a local model that has no chat template; see LocalViewer
    max_new_tokens: int = 64
    batch_size: int = 8  # questions to a local model at once
    device: str = "auto"
    dtype: str = "auto"
    veto_text: bool = False  # ask, too, what is written in the picture; no score where the prompt's words are
    veto: Veto = field(default_factory=Veto)  # how that is decided
    viewer: Viewer | None = None  # whom to ask instead of all this; from Python only

    @property
    def deterministic(self) -> bool:
        """A local model answers greedily; of others nothing is known."""
        return self.url is None and self.viewer is None

    @abstractmethod
    def judged(
        self, images: Sequence[Image], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[Score]:
        """N scores, before the check for written words."""

    def __call__(
        self, images: Sequence[Image], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[Score]:
        scores = self.judged(images, prompts, metadata)
        wanted = [index for index, score in enumerate(scores) if score.value is not None]
        if not (self.veto_text and wanted):
            return scores
        seen = [images[index] for index in wanted]
        texts = self.veto.read(seen)
        if texts is None:
            texts = self.asked.ask(seen, [self.veto.question] * len(seen))
        for index, text in zip(wanted, texts, strict=True):
            scores[index] = self.veto.passed(scores[index], prompts[index], text)
        return scores

    def ask(self, images: Sequence[Image], questions: Sequence[str]) -> list[str | Failure]:
        """A legible answer to each question about its picture, or why there is none."""
        return [checked(answer) for answer in self.asked.ask(images, questions)]

    @property
    def bounds_its_time(self) -> bool:
        """A model behind an address is asked within a budget of its own, so run.reward_timeout does not count."""
        return self.url is not None

    @cached_property
    def asked(self) -> Viewer:
        """Whom the questions go to; a local model is loaded with the first of them."""
        if self.viewer is not None:
            return self.viewer
        if self.url is not None:
            persistence = Persistence(concurrency=self.concurrency)
            return ChatModel(
                self.url, self.model, self.token_env, max_tokens=self.max_new_tokens, persistence=persistence
            )
        return LocalViewer(
            self.model, self.revision, self.template, self.max_new_tokens, self.batch_size, self.device, self.dtype
        )
