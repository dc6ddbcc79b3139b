"""A reward that does not answer ends in an error with the stacks of all threads, not in a run that stands still."""

from __future__ import annotations

import asyncio
import faulthandler
import inspect
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from functools import update_wrapper
from pathlib import Path
from types import FrameType
from typing import Any

from tiller.rewards.call import FLAGS, Reward, reward_name
from tiller.rewards.gradient import differentiable
from tiller.types import RewardTimeout

BATCH = 32  # pictures; a call with more of them gets more time, in proportion


def within(reward: Reward, seconds: float | None, stacks: Path | None = None) -> Reward:
    """The same reward, but each call runs in a daemon thread of its own and must end within some seconds.

    A reward with a gradient is returned as it is: it computes, and asks nobody. So is one that says
    `bounds_its_time = True`, as a remote one does, which waits for its server and ends by itself.

    Args:
        seconds: for up to 32 pictures (or pairs of them), and in proportion for more; None waits for ever.
        stacks: a file for the stacks of all threads; by default they go to standard error.

    Raises (when called):
        RewardTimeout: it did not answer in time. Its thread is left behind.
    """
    if seconds is None or differentiable(reward) or getattr(reward, "bounds_its_time", False):
        return reward

    def limited(*arguments: Any) -> Any:
        count = len(arguments[0])
        limit = seconds * max(1.0, count / BATCH)
        answer: Future[Any] = Future()
        thread = threading.Thread(target=_answer, args=(answer, reward, *arguments), daemon=True)
        thread.start()
        if not _ends(answer, limit):
            raise RewardTimeout(_complaint(reward, count, limit, thread, stacks))
        return answer.result()

    update_wrapper(limited, reward, assigned=("__doc__", "__module__"), updated=())
    limited.__name__ = reward_name(reward)
    for name in FLAGS:
        if hasattr(reward, name):
            setattr(limited, name, getattr(reward, name))
    return limited


def _answer(answer: Future[Any], reward: Reward, *arguments: Sequence[Any]) -> None:
    try:
        result = reward(*arguments)  # type: ignore[arg-type]
        answer.set_result(asyncio.run(result) if inspect.iscoroutine(result) else result)
    except BaseException as error:  # handed to whoever waits
        answer.set_exception(error)


def _ends(answer: Future[Any], limit: float) -> bool:
    ended = threading.Event()
    answer.add_done_callback(lambda _: ended.set())
    return ended.wait(limit)


def _complaint(reward: Reward, count: int, limit: float, thread: threading.Thread, stacks: Path | None) -> str:
    place = _place(inspect.unwrap(reward), thread)
    try:
        if stacks is None:
            faulthandler.dump_traceback(sys.__stderr__ or 2)
        else:
            with stacks.open("w") as file:
                faulthandler.dump_traceback(file)
        written = f"the stacks of all threads are {f'in {stacks}' if stacks else 'above'}"
    except (OSError, ValueError) as error:
        written = f"the stacks could not be written: {error}"
    return (
        f"reward {reward_name(reward)} did not answer within {limit:g} s for {count} image(s){place} ({written}); "
        "mend it, or give it more time (run.reward_timeout)."
    )


def _place(reward: Any, thread: threading.Thread) -> str:
    """Where in the reward's own file its thread stands; where it stands at all, if that is elsewhere."""
    code = getattr(reward, "__code__", None) or getattr(type(reward).__call__, "__code__", None)
    frame: FrameType | None = sys._current_frames().get(thread.ident or 0)
    here = frame
    while frame is not None and (code is None or frame.f_code.co_filename != code.co_filename):
        frame = frame.f_back
    found = frame or here
    return "" if found is None else f" and stands at {Path(found.f_code.co_filename).name}:{found.f_lineno}"
