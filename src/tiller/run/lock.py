"""One writer per run folder. The lock is the system's own, so it ends with the process, however that ends."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from tiller.types import RunError

try:
    import fcntl
except ImportError:  # Windows, where two writers are not noticed
    fcntl = None  # type: ignore[assignment]


class Lock:
    """An exclusive lock on a file."""

    def __init__(self, path: Path):
        self._path = path
        self._file: IO[bytes] | None = None

    def acquire(self) -> None:
        """Take it, or raise RunError if another process has it."""
        file = self._path.open("ab")
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise RunError(
                f"{self._path.parent} is in use by another process; wait for it or choose another run.output_dir."
            ) from error
        except OSError:
            pass  # a file system without locks
        self._file = file

    def release(self) -> None:
        """Let it go, if it is held."""
        if self._file is not None:
            self._file.close()
            self._file = None
