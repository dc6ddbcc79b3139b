"""Files of one JSON object per line, each with its epoch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tiller.run.files import reached, replace_file, writing


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Add a line; a number that is not finite becomes null.

    Raises:
        RunError: there is no room. The lines before are untouched.
    """
    extend(path, [line])


def extend(path: Path, several: Iterable[Mapping[str, Any]]) -> None:
    """Add lines, all or none; a number that is not finite becomes null.

    Raises:
        RunError: there is no room. The lines before are untouched.
    """
    text = "".join(
        json.dumps({name: _finite(value) for name, value in line.items()}, ensure_ascii=False) + "\n"
        for line in several
    )
    with writing(path), path.open("ab", buffering=0) as file:
        size, rest = file.tell(), memoryview(text.encode())
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            os.truncate(path, size)
            raise
    reached(f"append {path.name}")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cut(path: Path, epoch: int | None) -> None:
    """Keep the lines up to an epoch; None keeps nothing. A torn line, and all behind it, goes too."""
    if not path.exists():
        return
    text = path.read_bytes()
    kept = b"" if epoch is None else b"".join(_until(text, epoch))
    if kept != text:
        replace_file(path, kept)


def _until(text: bytes, epoch: int) -> Iterator[bytes]:
    for line in text.splitlines(keepends=True):
        try:
            whole = line.endswith(b"\n") and json.loads(line)["epoch"] <= epoch
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            return
        yield line
