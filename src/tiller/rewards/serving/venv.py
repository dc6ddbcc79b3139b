"""A reward in a virtual environment of its own, for packages that do not get on with ours.

reward: {name: my_rewards.py:score, python: /path/to/venv/bin/python}
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import secrets
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from PIL.Image import Image

from tiller.rewards.serving import child
from tiller.rewards.serving.client import Server
from tiller.rewards.serving.exchange import Times
from tiller.rewards.serving.persistence import Persistence
from tiller.rewards.serving.protocol import Limits, plain
from tiller.types import ConfigError, Score, ServiceError

LINES = 12  # of the child's stderr that an error shows
LIMITS = Limits(body=2**30, pictures=4096, total_pixels=2**30)  # we ask ourselves
logger = logging.getLogger(__name__)


class Died(Exception):
    """The child is no longer there."""


@dataclass(frozen=True)
class InVenv:
    """A reward that a child process computes with another Python, over the loopback, behind a random token.

    The child is started at the first call, once more if it dies, and ends with this process, however that ends. Its
    environment needs Python 3.10 and Pillow, and nothing of tiller.

    Raises (when called):
        ServiceError: the child does not start, or dies twice in one call; with the last lines of its stderr.
    """

    reward: str  # package.module:name in that environment, or path/file.py:name; a class is called with `settings`
    python: str  # that environment's interpreter
    settings: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)  # environment variables that it gets beside ours
    batch_size: int = 16  # pictures per request
    start_timeout: float = 300.0  # seconds until the reward is loaded
    timeout: float = 300.0  # seconds for one request
    groupwise: bool = False  # it compares pictures of one prompt, so they stay in one request
    deterministic: bool = False  # it gives the same picture the same score, so that it may be cached

    bounds_its_time = True  # so run.reward_timeout does not count

    def __post_init__(self) -> None:
        place, colon, name = self.reward.rpartition(":")
        if not (place and colon and name):
            raise ConfigError(
                f"config error: {self.reward!r} cannot run in another environment, where tiller's own rewards are not; "
                "give package.module:name or path/file.py:name."
            )
        if place.endswith(".py") and not Path(place).is_file():
            raise ConfigError(f"config error: there is no file {place}; a path starts at the working directory.")
        if not os.access(self.python, os.X_OK) or Path(self.python).is_dir():
            raise ConfigError(
                f"config error: python is {self.python!r}, which is no program; give the path of a virtual "
                "environment's bin/python."
            )
        if self.batch_size < 1 or min(self.start_timeout, self.timeout) <= 0:
            raise ConfigError("batch_size must be at least 1, and start_timeout and timeout more than 0 seconds.")

    def __call__(
        self, images: Sequence[Image], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[Score] | dict[str, list[Score]]:
        """One score per picture, or named ones."""
        server = self._child.server()
        try:
            return server(images, prompts, metadata)
        except Died:
            logger.warning(f"{self._child.service} died and is started again{self._child.last_words()}")
            server = self._child.server()
        try:
            return server(images, prompts, metadata)
        except Died:
            raise ServiceError(f"{self._child.service} died twice{self._child.last_words()}") from None

    @cached_property
    def _child(self) -> Child:
        return Child(self)


class Child:
    """The process, while there is one."""

    def __init__(self, settings: InVenv):
        self._settings = settings
        self.service = f"reward {settings.reward} in {settings.python}"
        self._process: subprocess.Popen[bytes] | None = None
        self._server: Server | None = None
        self._stderr: deque[str] = deque(maxlen=LINES)
        self._lock = threading.Lock()

    def server(self) -> Server:
        """The running child's server; it is started if there is none.

        Raises:
            ServiceError: it does not start.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None or self._server is None:
                self._server = self._start()
            return self._server

    def _start(self) -> Server:
        token = secrets.token_urlsafe(32)
        process = self._spawn(token)
        self._process = process
        atexit.register(_end, process)
        said = self._first_line(process)
        if "port" not in said:
            _end(process)
            why = f": {plain(str(said['error']), 300)}" if "error" in said else ""
            raise ServiceError(f"{self.service} does not start{why}{self.last_words()}")

        def watch() -> None:
            if process.poll() is not None:
                raise Died

        return Server(
            f"http://127.0.0.1:{int(said['port'])}",
            self.service,
            {"Authorization": f"Bearer {token}"},
            self._settings.batch_size,
            groupwise=self._settings.groupwise,
            times=Times(read=self._settings.timeout, total=self._settings.timeout),
            persistence=Persistence(concurrency=2, retries=1, backoff=0.1, budget=2 * self._settings.timeout),
            watch=watch,
        )

    def _spawn(self, token: str) -> subprocess.Popen[bytes]:
        settings = self._settings
        process = subprocess.Popen(
            [settings.python, "-I", child.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **settings.env},
            start_new_session=True,  # a Ctrl-C is ours to handle; the child ends when its stdin does
        )
        assert process.stdin is not None
        order = {
            "reward": settings.reward,
            "settings": settings.settings,
            "token": token,  # over a pipe: neither its arguments nor its environment can be read by others
            "timeout": settings.timeout,
            "limits": vars(LIMITS),
        }
        self._stderr.clear()
        threading.Thread(target=self._listen, args=(process,), daemon=True).start()
        try:
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()  # and it stays open
        except BrokenPipeError:
            pass  # it has ended already; its stderr says why
        return process

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            self._stderr.append(plain(line.decode(errors="replace"), 200))

    def _first_line(self, process: subprocess.Popen[bytes]) -> dict[str, Any]:
        """What the child says on stdout: its port, or an error; nothing if it says nothing in time."""
        lines: SimpleQueue[bytes] = SimpleQueue()
        assert process.stdout is not None
        threading.Thread(target=lambda: lines.put(process.stdout.readline()), daemon=True).start()  # type: ignore[union-attr]
        try:
            said = json.loads(lines.get(timeout=self._settings.start_timeout))
            return said if isinstance(said, dict) else {}
        except Empty:
            return {"error": f"it was not ready after {self._settings.start_timeout:g} s"}
        except ValueError:
            return {}

    def last_words(self) -> str:
        """The end of its stderr, for a message."""
        time.sleep(0.1)  # for the thread that reads it
        lines = [line for line in self._stderr if line]
        return "; its last lines were: " + " | ".join(lines) if lines else "; it wrote nothing"


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()
