"""A vision-language model behind an OpenAI-compatible address (vLLM, SGLang, llama.cpp, Ollama, a vendor's), asked
about pictures.

    judge = ChatModel("http://127.0.0.1:8000/v1", "Qwen/Qwen3-VL-8B-Instruct", token_env="JUDGE_TOKEN")
    answers = judge.ask(images, questions)  # one str or Failure(reason) per question, in order
    answers = judge.ask(None, questions)  # text alone

`images[i]` is a PIL picture, a list of several, or None. Pictures travel as `data:` URLs in the request and in no other
way: an address inside a request would let whoever writes prompts make the server fetch it. A `Failure` is a question
without an answer after all retries: a judge makes it a missing score, `Score(None, reason=failure.reason)`, never 0.
The text is the model's and untrusted: parse it strictly. `judge.usage` counts requests and tokens.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from PIL.Image import Image

from tiller.rewards.serving.exchange import (
    AGAIN,
    AWAY,
    MEBIBYTE,
    Answer,
    Fault,
    Refusal,
    Times,
    bearer,
    check_address,
    exchange,
)
from tiller.rewards.serving.persistence import Asking, Failure, Persistence
from tiller.rewards.serving.protocol import FORMATS, encode_picture, plain
from tiller.types import ConfigError, RewardError

OF_ONE = {400, 413, 422}  # refusals that concern one question, such as a picture that a filter does not like
TAKEN = ("model", "messages", "stream", "n")

Pictures = Image | Sequence[Image] | None


class Usage:
    """What has been asked so far; several threads count here."""

    def __init__(self) -> None:
        self.requests = self.prompt_tokens = self.completion_tokens = 0
        self._lock = threading.Lock()

    def add(self, counted: Any) -> None:
        """One answered request, with the `usage` of its answer, if it holds one."""
        numbers = counted if isinstance(counted, Mapping) else {}
        with self._lock:
            self.requests += 1
            self.prompt_tokens += _whole(numbers.get("prompt_tokens"))
            self.completion_tokens += _whole(numbers.get("completion_tokens"))

    def __repr__(self) -> str:
        return (
            f"Usage(requests={self.requests}, prompt_tokens={self.prompt_tokens}, "
            f"completion_tokens={self.completion_tokens})"
        )


def _whole(number: Any) -> int:
    return number if isinstance(number, int) and not isinstance(number, bool) and number >= 0 else 0


@dataclass(frozen=True)
class ChatModel:
    """A chat model at `url`/chat/completions. Each question is a request of its own.

    Raises (when asked):
        ServiceError: the server is away for longer than the budget, or refuses every question alike (a wrong token,
            an unknown model).
    """

    url: str  # such as http://127.0.0.1:8000/v1
    model: str
    token_env: str | None = None  # the name of the environment variable that holds the token
    system: str | None = None  # what the model is told before each question
    temperature: float = 0.0
    max_tokens: int = 256
    picture: str = "png"  # png, webp (both lossless) or jpeg
    extra: Mapping[str, Any] = field(default_factory=dict)  # further fields of the request
    times: Times = field(default_factory=Times)
    persistence: Persistence = field(default_factory=Persistence)
    usage: Usage = field(default_factory=Usage, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_address(self.url)
        bearer(self.token_env)
        if self.picture not in FORMATS:
            raise ConfigError(f"config error: picture is {self.picture!r}; give one of {', '.join(FORMATS)}.")
        if taken := [key for key in TAKEN if key in self.extra]:
            raise ConfigError(f"config error: extra.{taken[0]} is set by the request itself; leave it out.")

    def ask(self, images: Sequence[Pictures] | None, questions: Sequence[str]) -> list[str | Failure]:
        """The model's answer to each question about its picture(s), in order."""
        shown: Sequence[Pictures] = [None] * len(questions) if images is None else images
        if len(shown) != len(questions):
            raise RewardError(f"{len(shown)} images do not belong to {len(questions)} questions; give one for each.")
        headers = {"Content-Type": "application/json", **bearer(self.token_env)}
        asking: Asking[str | Failure] = Asking(
            f"chat model {self.model} at {self.url}",
            lambda numbers, deadline: {
                numbers[0]: self._one(shown[numbers[0]], questions[numbers[0]], headers, deadline)
            },
            lambda numbers: [[number] for number in numbers],
            lambda: self._alive(headers),
            self.persistence,
        )
        return cast(list[str | Failure], asking.all(len(questions)))

    def _one(self, images: Pictures, question: str, headers: Mapping[str, str], deadline: float) -> str | Failure:
        body = json.dumps(self._request(images, question)).encode()
        answer = exchange(f"{self.url.rstrip('/')}/chat/completions", body, headers, self.times, MEBIBYTE, deadline)
        if answer.status in OF_ONE:
            return Failure(f"the chat model refused the question ({_said(answer)})")
        if answer.status in AGAIN:
            raise Fault(_said(answer), answered=answer.status not in AWAY, wait=answer.wait)
        if answer.status != 200:
            raise Refusal(f"chat model {self.model} at {self.url} refuses ({_said(answer)}); check url and token_env.")
        return self._text(answer)

    def _request(self, images: Pictures, question: str) -> dict[str, Any]:
        pictures = [images] if isinstance(images, Image) else list(images or ())
        if not all(isinstance(picture, Image) for picture in pictures):
            raise RewardError("a chat model is asked about PIL pictures, not addresses or files; open them first.")
        content: Any = question
        if pictures:
            content = [_shown(picture, self.picture) for picture in pictures]
            content.append({"type": "text", "text": question})
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages.append({"role": "user", "content": content})
        fixed = {"model": self.model, "messages": messages, "stream": False}
        return {"temperature": self.temperature, "max_tokens": self.max_tokens, **self.extra, **fixed}

    def _text(self, answer: Answer) -> str | Failure:
        """The words of an answer, checked."""
        try:
            data = json.loads(answer.body)
            message = data["choices"][0]["message"]
            content = message["content"]
        except (ValueError, RecursionError, LookupError, TypeError) as error:
            raise Fault("the answer is no chat completion", answered=True) from error
        self.usage.add(data.get("usage"))
        if not isinstance(content, str) or not content.strip():
            return Failure("the chat model said nothing")
        return content

    def _alive(self, headers: Mapping[str, str]) -> bool:
        """Whether anything answers at the address; what it says does not matter."""
        try:
            limit = min(5.0, self.times.total)
            found = exchange(f"{self.url.rstrip('/')}/models", None, headers, Times(limit, limit, limit), MEBIBYTE)
            return found.status not in AWAY
        except Fault as fault:
            return fault.answered


def _shown(picture: Image, kind: str) -> dict[str, Any]:
    data = base64.b64encode(encode_picture(picture, kind)).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}"}}


def _said(answer: Answer) -> str:
    """The status, and the beginning of what came with it, fit for a terminal."""
    return f"status {answer.status}: {plain(answer.body.decode(errors='replace'), 200)}"
