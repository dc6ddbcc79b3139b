"""One call of a reward: what it may say of itself, what it is called in messages, and how a failure is told."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch

from tiller.rewards.gradient import as_tensor, differentiable
from tiller.rewards.redact import redacted
from tiller.types import RewardError, RewardTimeout, ServiceError

Reward = Callable[..., Any]
"""What a reward is: `(images, prompts, metadata)` to N entries, or to a mapping from names to N entries each. An entry
is a number, None or NaN (missing), or a `tiller.types.Score`. An `async def` is one too. What it may say of itself:
FLAGS."""

FLAGS = {
    "differentiable": "gets one tensor (N, 3, H, W) in [0, 1], and returns tensors with their graph",
    "deterministic": "gives the same picture the same score again, so that it may be cached",
    "groupwise": "is called with all pictures of one prompt, and scores them against each other",
    "pairwise": "is called as (first, second, prompts, metadata), and returns the probability that the first is better",
    "symmetric": "of a pairwise one: p(a, b) is 1 - p(b, a), so that each pair is asked about once",
    "workers": "how many calls it allows at once; 1, if it does not say",
    "bounds_its_time": "ends each call by itself, so that run.reward_timeout does not count",
}
"""The attributes a reward may carry, and what each one says."""


def flag(reward: object, name: str) -> bool:
    """Whether a reward says that of itself."""
    return bool(getattr(reward, name, False))


def relative(reward: object) -> bool:
    """Whether a score depends on the other pictures of the prompt: of a groupwise or a pairwise reward."""
    return flag(reward, "groupwise") or flag(reward, "pairwise")


def workers(reward: object) -> int:
    """How many calls at once a reward allows."""
    return max(1, int(getattr(reward, "workers", None) or 1))


def reward_name(reward: object) -> str:
    """What to call a reward in a message and in the log: its function's name, or its class's."""
    if isinstance(reward, partial):
        return reward_name(reward.func)
    return getattr(reward, "__name__", type(reward).__name__)


def call(reward: Reward, pictures: Sequence[list[Any]], prompts: list[str], metadata: list[Mapping[str, Any]]) -> Any:
    """The raw answer to one list of pictures, or to two; a failure names the function and the prompts it had in hand.

    Raises:
        RewardError: the reward raised.
    """
    try:
        if differentiable(reward):
            with torch.no_grad():
                return reward(*map(as_tensor, pictures), prompts, metadata)
        result = reward(*pictures, prompts, metadata)
        return _wait(result) if inspect.iscoroutine(result) else result
    except (RewardTimeout, ServiceError):
        raise
    except Exception as error:
        different = list(dict.fromkeys(prompts))
        asked = ", ".join(repr(prompt) for prompt in different[:3]) + (", ..." if len(different) > 3 else "")
        detail = (f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) + _line(reward, error)
        raise RewardError(
            f"reward {reward_name(reward)} failed on {len(pictures[0])} image(s) of {asked}: {redacted(detail)}; "
            "mend it, or return None for a picture it cannot score."
        ) from error


def _line(reward: object, error: Exception) -> str:
    """Where in the reward's own source it happened, if that can be told."""
    inner: Any = inspect.unwrap(reward)  # type: ignore[arg-type]
    code = getattr(inner, "__code__", None) or getattr(type(inner).__call__, "__code__", None)
    lines = [number for frame, number in walk_tb(error.__traceback__) if frame.f_code is code]
    return f" ({Path(code.co_filename).name}:{lines[-1]})" if code and lines else ""


def _wait(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine, also where an event loop already runs in this thread (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()
