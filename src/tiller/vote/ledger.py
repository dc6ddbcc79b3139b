"""The votes file: one JSON object per line, each with a checksum; lines are only ever added.

A vote is `{"vote": id, "contest": ..., "rater": ..., "choice": "first", "prompt": ..., "first": "a.png", ...}`, an
undo is `{"undo": id, ...}`. Paths of pictures count from the file's folder. A line is on the disk before it is answered
for; one that a kill tore is cut off at the next start.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from tiller.types import ConfigError, RunError

try:
    import fcntl
except ImportError:  # Windows, where two writers are not noticed
    fcntl = None  # type: ignore[assignment]

Choice = Literal["first", "second", "tie", "skip"]
CHOICES = ("first", "second", "tie", "skip")


@dataclass(frozen=True)
class Vote:
    """One rater's word on two pictures of a prompt."""

    vote: str  # its id, made of rater, contest and how often the rater has undone it; see `tally.ballot_id`
    contest: str
    rater: str
    choice: Choice
    prompt: str
    first: str  # path, from the votes file's folder
    second: str
    first_sha256: str  # of the file
    second_sha256: str
    first_from: str = ""  # such as base, or a folder's name
    second_from: str = ""
    left: Literal["first", "second"] = "first"  # which one was shown on the left
    seconds: float | None = None  # from the pictures being there to the vote, as the page tells
    time: str = ""  # UTC


@dataclass(frozen=True)
class Undo:
    """A rater takes a vote back."""

    undo: str  # the vote's id
    rater: str
    time: str = ""


Entry = Vote | Undo


class Ledger:
    """A votes file, open for adding to. Its lock is the system's own, and ends with the process.

    Raises:
        RunError: the file is in use, or cannot be written.
        ConfigError: a line before the last one is damaged, or no vote.
    """

    def __init__(self, path: Path, tell: Callable[[str], None] = print):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            new = not path.exists()
            self._file = path.open("ab", buffering=0)
            if new:
                _sync_folder(path.parent)
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror}; name another file with --votes.") from error
        try:
            self._lock()
            self.entries, length = read(path)
            torn = os.path.getsize(path) - length
            if torn:
                os.truncate(path, length)
                os.fsync(self._file.fileno())
                tell(f"{path}: the last line was torn ({torn} bytes), and is cut off; the votes before it are whole.")
        except BaseException:
            self._file.close()
            raise

    def append(self, entry: Entry) -> None:
        """Add a line; when this returns, it is on the disk.

        Raises:
            RunError: there is no room. The lines before are untouched.
        """
        line, size = encode(entry), os.fstat(self._file.fileno()).st_size
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            os.truncate(self.path, size)
            raise RunError(f"cannot write {self.path}: {error.strerror}; make room, then vote again.") from error

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"{self.path} is in use by another voting page; vote there, or name another file with --votes."
            ) from error
        except OSError:
            pass  # a file system without locks


def encode(entry: Entry) -> bytes:
    """The line of an entry: JSON in ASCII, whose last key is the CRC-32 of all before it."""
    body = json.dumps(asdict(entry))
    return f'{body[:-1]}, "crc32": "{zlib.crc32(body.encode()):08x}"}}\n'.encode()


_TAIL = len(', "crc32": "00000000"}\n')


def decode(line: bytes) -> Entry:
    """An entry of its line.

    Raises:
        ValueError: it is torn or damaged, or no entry.
    """
    body, tail = line[:-_TAIL] + b"}", line[-_TAIL:]
    if tail != b', "crc32": "%08x"}\n' % zlib.crc32(body):
        raise ValueError("its checksum does not fit")
    values = json.loads(body)
    kind = Vote if "vote" in values else Undo
    if unknown := set(values) - {field.name for field in fields(kind)}:
        raise ValueError(f"it has an unknown {min(unknown)}")
    if kind is Vote and values.get("choice") not in CHOICES:
        raise ValueError("its choice is unknown")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(str(error)) from error


def read(path: Path) -> tuple[list[Entry], int]:
    """What a votes file holds, and the length in bytes of its sound lines: all, or all but a torn last one.

    Raises:
        ConfigError: a line before the last one is damaged, or no vote.
    """
    lines, entries, length = path.read_bytes().splitlines(keepends=True), [], 0
    for number, line in enumerate(lines, 1):
        try:
            entries.append(decode(line))
        except ValueError as error:
            if number == len(lines) and (entries or _begun(line)):
                break
            raise ConfigError(
                f"{path}, line {number}: no vote ({error}); repair or remove the line, or name another file."
            ) from error
        length += len(line)
    return entries, length


def _begun(line: bytes) -> bool:
    """Whether it may be the beginning of a votes file's first line, and not somebody's other file."""
    return not line.endswith(b"\n") and any(line[:9] == start[: len(line)] for start in (b'{"vote": ', b'{"undo": '))


def is_votes(entry: object) -> bool:
    """Whether an object of a JSONL file is one of a votes file."""
    return isinstance(entry, Mapping) and "crc32" in entry and ("vote" in entry or "undo" in entry)


def is_votes_file(path: Path) -> bool:
    """Whether the first line of a file is one of a votes file."""
    with path.open("rb") as file:
        line = file.readline(1 << 20)
    try:
        entry: Any = json.loads(line)
    except ValueError:
        return False
    return is_votes(entry)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return  # Windows cannot open a folder, and needs not
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
