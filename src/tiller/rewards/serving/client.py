"""A reward that another process computes, asked over HTTP: `{name: remote, url: http://127.0.0.1:8700}`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from PIL.Image import Image

from tiller.rewards.serving import protocol
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
from tiller.rewards.serving.protocol import Malformed, Result, plain
from tiller.types import ConfigError, Score, ServiceError

PER_RESULT = 64 * 1024  # bytes of an answer, beside one mebibyte
HEALTH = 5.0  # seconds to say that it is there
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Server:
    """A reward server, and how to ask it. Called, it is a reward."""

    url: str
    service: str  # what to call it in messages
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    batch_size: int = 16  # pictures per request
    picture: str = "webp"
    groupwise: bool = False  # all pictures of a call go into one request
    times: Times = field(default_factory=Times)
    persistence: Persistence = field(default_factory=Persistence)
    watch: Callable[[], Any] = lambda: None  # called before the server is asked whether it lives; may raise
    memory: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)  # what it said of its reward

    def __call__(
        self, images: Sequence[Image], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[Score] | dict[str, list[Score]]:
        """One score per picture, or named ones; missing with a reason where the server gave none in its time.

        Raises:
            ServiceError: it is away for longer than the budget, or refuses.
        """

        if not all(isinstance(image, Image) for image in images):
            raise ServiceError(f"{self.service} takes single pictures, and these are {type(images[0]).__name__}s.")

        def ask(numbers: list[int], deadline: float) -> Mapping[int, Result]:
            found = self._score(
                [images[number] for number in numbers],
                [prompts[number] for number in numbers],
                [metadata[number] for number in numbers],
                deadline,
            )
            return {numbers[index]: result for index, result in found.items()}

        asking = Asking(self.service, ask, self._split, self.alive, self.persistence)
        return self._scores(asking.all(len(images)))

    def _split(self, numbers: list[int]) -> list[list[int]]:
        size = len(numbers) if self.groupwise else self.batch_size
        return [numbers[start : start + size] for start in range(0, len(numbers), size)]

    def _score(
        self, images: list[Image], prompts: list[str], metadata: list[Mapping[str, Any]], deadline: float
    ) -> dict[int, Result]:
        """One request."""
        try:
            body = protocol.write_request(images, prompts, metadata, self.picture)
        except (TypeError, ValueError) as error:
            raise ServiceError(f"the prompts' metadata cannot be sent to {self.service} as JSON: {error}.") from error
        headers = {"Content-Type": "application/json", **self.headers}
        cap = MEBIBYTE + PER_RESULT * len(images)
        answer = exchange(f"{self.url.rstrip('/')}/v1/score", body, headers, self.times, cap, deadline)
        if answer.status in AGAIN:
            raise Fault(_said(answer), answered=answer.status not in AWAY, wait=answer.wait)
        if answer.status != 200:
            raise Refusal(f"{self.service} refuses ({_said(answer)}); {_cure(answer.status)}.")
        try:
            results, reward = protocol.read_answer(answer.body, len(images))
        except Malformed as error:
            raise Fault(str(error), answered=True) from error
        self._remember(reward)
        if self.groupwise and len(results) < len(images):
            raise Fault("the answer left some pictures out", answered=True)
        return results

    def _remember(self, reward: Mapping[str, Any]) -> None:
        """What the server says it serves: it must fit how it is asked, and should stay the same."""
        if reward.get("groupwise") and not self.groupwise:
            raise Refusal(f"{self.service} compares the pictures of a prompt; add groupwise: true to its settings.")
        known = {key: plain(str(reward.get(key, "")), 80) for key in ("name", "version")}
        before = self.memory.setdefault("reward", known)
        if before != known:
            logger.warning(
                f"{self.service} has changed its reward from {before['name']} {before['version']} to {known['name']} "
                f"{known['version']}; scores before and after may not be comparable"
            )
            self.memory["reward"] = known

    def _scores(self, results: Sequence[Result | Failure]) -> list[Score] | dict[str, list[Score]]:
        names = {tuple(result.parts) for result in results if isinstance(result, Result)}
        if len(names) > 1:
            raise Refusal(f"{self.service} named other scores for some pictures than for others; mend it.")
        if names:
            self.memory["names"] = names.pop()
        known: tuple[str, ...] = self.memory.get("names", ())
        if not known:
            return [_score_of(result, None) for result in results]
        return {name: [_score_of(result, name) for result in results] for name in known}

    def alive(self) -> bool:
        """Whether anything answers there."""
        self.watch()
        limit = min(HEALTH, self.times.total)
        try:
            answer = exchange(f"{self.url.rstrip('/')}/health", None, {}, Times(limit, limit, limit), MEBIBYTE)
            return answer.status not in AWAY
        except Fault as fault:
            return fault.answered


def _score_of(result: Result | Failure, part: str | None) -> Score:
    if isinstance(result, Failure):
        return Score(None, reason=result.reason)
    value = result.value if part is None else result.parts[part]
    return Score(value, "" if value is not None else result.reason, result.note)


def _said(answer: Answer) -> str:
    """The status, and the server's own sentence if there is one."""
    try:
        words = json.loads(answer.body)["error"]
    except (ValueError, RecursionError, LookupError, TypeError):
        words = ""
    return f"status {answer.status}" + (f": {plain(words, 300)}" if isinstance(words, str) and words else "")


def _cure(status: int) -> str:
    if 300 <= status < 400:
        return "redirects are not followed: give the address itself"
    cures = {
        401: "name the environment variable with its token as token_env",
        403: "ask it by an address that it knows, with its token (token_env)",
        404: "check its address",
        413: "lower batch_size",
        422: "mend that reward",
    }
    return cures.get(status, "mend the request, or the server")


@dataclass(frozen=True)
class Remote:
    """The reward behind an address, as `tiller serve` puts it there.

    Raises (when called):
        ServiceError: the server is away for longer than the budget, or refuses.
    """

    url: str  # such as http://127.0.0.1:8700
    token_env: str | None = None  # the name of the environment variable that holds the token, never the token
    batch_size: int = 16  # pictures per request
    concurrency: int = 4  # requests at once
    picture: Literal["png", "webp", "jpeg"] = "webp"  # png and webp lose nothing; webp takes a third of png's time
    timeout: float = 300.0  # seconds for one request
    connect_timeout: float = 10.0  # seconds
    read_timeout: float = 300.0  # seconds without a byte, so at least as long as the reward takes
    retries: int = 4  # of one request
    budget: float = 600.0  # seconds without any answer, after which the run ends
    groupwise: bool = False  # it compares pictures of one prompt, so they stay in one request
    deterministic: bool = False  # it gives the same picture the same score, so that it may be cached

    bounds_its_time = True  # by `budget`; so run.reward_timeout does not count

    def __post_init__(self) -> None:
        check_address(self.url)
        bearer(self.token_env)
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}; it must be at least 1.")
        Times(self.connect_timeout, self.read_timeout, self.timeout)
        Persistence(self.concurrency, self.retries, budget=self.budget)

    def __call__(
        self, images: Sequence[Image], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[Score] | dict[str, list[Score]]:
        """One score per picture, or named ones."""
        return self._server(images, prompts, metadata)

    @cached_property
    def _server(self) -> Server:
        return Server(
            self.url,
            f"reward server {self.url}",
            bearer(self.token_env),
            self.batch_size,
            self.picture,
            self.groupwise,
            Times(self.connect_timeout, self.read_timeout, self.timeout),
            Persistence(self.concurrency, self.retries, budget=self.budget),
        )
