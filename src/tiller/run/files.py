"""Writing files so that a kill, a full disk or a power cut leaves the old one or the new one, and never a half."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tiller.types import RunError

TEMPORARY = ".tmp-"  # how the names of unfinished files and folders begin; they are never read


def reached(point: str) -> None:
    """Does nothing. Every step of every write passes here, so that tests can break it off at each of them."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises RunError, with the path and the space that is free, for what goes wrong in the block."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise RunError(
            f"cannot write {path}: {reason} ({_free(path)} free there); make room or choose another run.output_dir, "
            "then give the same command again."
        ) from error


def _free(path: Path) -> str:
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return f"{shutil.disk_usage(path).free / 1e9:.2f} GB"
    except OSError:
        return "an unknown space"


def write_file(path: Path, data: bytes) -> None:
    """Write and fsync; the file may be torn if this is broken off."""
    with path.open("wb") as file:
        reached(f"open {path.name}")
        file.write(data)
        file.flush()
        reached(f"write {path.name}")
        os.fsync(file.fileno())
    reached(f"fsync {path.name}")


def replace_file(path: Path, data: bytes) -> None:
    """Write a file as a whole or not at all.

    Raises:
        RunError: it cannot be written.
    """
    temporary = path.with_name(TEMPORARY + path.name)
    with writing(path):
        try:
            write_file(temporary, data)
            os.replace(temporary, path)
            reached(f"replace {path.name}")
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """fsync of a file, or of a folder's list of names."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder, and needs not
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    reached(f"sync {path.name}")


def to_json(value: Any) -> bytes:
    """Readable JSON with a fixed order of keys; a float comes back as the very same float."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        RunError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path} ({error}); choose another run.output_dir.") from error


def sha256(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_temporary(folder: Path) -> None:
    """Remove what unfinished writes left in a folder."""
    for path in folder.glob(TEMPORARY + "*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
