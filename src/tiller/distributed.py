"""Several processes: who takes which batch, what is gathered, what is averaged. The only importer of accelerate."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from tiller.types import ConfigError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # how long processes wait for one that hangs; one that died is noticed at once


def _leave() -> None:
    """Close the process group while the interpreter still stands; threads of it that outlive that abort the process."""
    if dist.is_initialized():
        dist.destroy_process_group()


class World:
    """All processes of a run; with one process, everything here is the identity.

    LoRA and full fine-tuning alike keep a whole copy of the weights in every process, so nothing wraps the
    denoiser: gradients are summed once per update.

    Raises:
        ConfigError: the launcher started several processes, and they do not find each other.
    """

    def __init__(self, timeout: timedelta = TIMEOUT):
        started = int(os.environ.get("WORLD_SIZE", 1))
        without = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        cpu = started > 1 and (without or not torch.accelerator.is_available())
        self._state = PartialState(cpu=cpu, timeout=timeout)
        if self._state.num_processes > 1:
            atexit.unregister(_leave)  # once is enough, however many worlds are made
            atexit.register(_leave)
        if self._state.num_processes != started:
            raise ConfigError(
                f"WORLD_SIZE is {started}, but {self._state.num_processes} processes found each other; use a launcher "
                "such as accelerate launch."
            )

    @property
    def rank(self) -> int:
        """The number of this process."""
        return self._state.process_index

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self._state.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self._state.is_main_process

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self._state.device

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of a list that is the same in all of them: every size-th item."""
        return list(items[self.rank :: self.size])

    def gather(self, mine: list[T]) -> list[T]:
        """The whole list again, in its first order, in every process, from everyone's `share` of it."""
        if self.size == 1:
            return mine
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, mine)
        whole = [None] * sum(len(part) for part in parts)
        for rank, part in enumerate(parts):
            whole[rank :: self.size] = part
        return whole  # type: ignore[return-value]

    def once(self, ask: Callable[[], T]) -> T:
        """What the main process found out, in every process."""
        return self.gather([ask()] if self.is_main else [])[0]

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Add up every parameter's gradient over all processes, in place; one that has none counts as zero."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def wait(self) -> None:
        """Until every process is here."""
        self._state.wait_for_everyone()
