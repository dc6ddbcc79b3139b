"""A socket whose whole conversation must end in time: one byte per second does not keep it open."""

from __future__ import annotations

import io
import socket
import time
from typing import Any


class TimedReader(io.RawIOBase):
    """Reads from a socket until a deadline, and never waits longer than `silence` for the next byte."""

    def __init__(self, connection: socket.socket, deadline: float, silence: float):
        self._connection, self.deadline, self._silence = connection, deadline, silence

    def readable(self) -> bool:
        """It reads."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Raises TimeoutError when the time is over."""
        self._connection.settimeout(min(self._silence, remaining(self.deadline)))
        return self._connection.recv_into(buffer)


class TimedSocket:
    """What `http.client` needs of a socket, with a deadline for all of it."""

    def __init__(self, connection: socket.socket, deadline: float, silence: float):
        self._connection, self._deadline, self._silence = connection, deadline, silence

    def sendall(self, data: Any) -> None:
        """Raises TimeoutError when the deadline passes; a socket's own time-out counts for all of `sendall`."""
        self._connection.settimeout(remaining(self._deadline))
        self._connection.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        """The answer, as a file."""
        return io.BufferedReader(TimedReader(self._connection, self._deadline, self._silence))

    def close(self) -> None:
        """Nothing: `http.client` closes as soon as it has read the head. Whoever opened the connection closes it."""


def remaining(deadline: float) -> float:
    """Seconds until a deadline of `time.monotonic`. Raises TimeoutError if it is over."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the time is over")
    return left
