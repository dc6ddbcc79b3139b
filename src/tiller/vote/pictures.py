"""Pictures from files that nobody vouches for: known by their content, and shown as nothing but pixels."""

from __future__ import annotations

import hashlib
import io
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from PIL import Image

from tiller.types import ConfigError

LARGEST_FILE = 64 << 20  # bytes
MOST_PIXELS = 50_000_000
LONGEST_SIDE = 2048  # pixels that the page gets
FORMATS = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True)
class Picture:
    """A picture file, as it was when it was looked at first."""

    path: Path
    sha256: str
    source: str = ""  # what drew it, such as base; raters never see it

    @property
    def id(self) -> str:
        """What the page calls it."""
        return self.sha256[:32]


def look_at(path: Path, source: str = "") -> Picture:
    """The picture of a file; its header is read, its pixels are not.

    Raises:
        ConfigError: there is no such file, it is too large, or no PNG, JPEG or WebP.
    """
    data = _read(path)
    _open(data, path)
    return Picture(path, hashlib.sha256(data).hexdigest(), source)


def as_png(picture: Picture) -> bytes:
    """The pixels alone, as a PNG: no metadata, no trailing bytes, and no trace of format or model.

    Raises:
        ConfigError: the file is gone, damaged, or no longer what it was.
    """
    data = _read(picture.path)
    if hashlib.sha256(data).hexdigest() != picture.sha256:
        raise ConfigError(f"{picture.path} has changed since the page began; start the page again.")
    with _open(data, picture.path) as opened:
        try:
            pixels = opened.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise ConfigError(f"{picture.path} cannot be read ({error}); repair or remove it.") from error
    pixels.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    clean = Image.frombytes("RGB", pixels.size, pixels.tobytes())
    clean.save(buffer, "png", compress_level=1, compress_type=zlib.Z_RLE)  # half the time of the default, no larger
    return buffer.getvalue()


class Shelf:
    """The last few pictures as the page gets them, so that one shown again is not made again."""

    ROOM = 64 << 20  # bytes

    def __init__(self) -> None:
        self._made: OrderedDict[str, bytes] = OrderedDict()
        self._size = 0
        self._lock = Lock()

    def png(self, picture: Picture) -> bytes:
        """As `as_png`."""
        with self._lock:
            if picture.id in self._made:
                self._made.move_to_end(picture.id)
                return self._made[picture.id]
        data = as_png(picture)
        with self._lock:
            if picture.id not in self._made:
                self._made[picture.id] = data
                self._size += len(data)
            while self._size > self.ROOM and len(self._made) > 1:
                self._size -= len(self._made.popitem(last=False)[1])
        return data


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise ConfigError(f"there is no picture {str(path)!r}; correct its path, or leave it out.")
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; repair or remove it.") from error
    if len(data) > LARGEST_FILE:
        raise ConfigError(f"{path} is larger than {LARGEST_FILE >> 20} MiB; make it smaller, or leave it out.")
    return data


def _open(data: bytes, path: Path) -> Image.Image:
    """The picture, of which only the header has been read."""
    if not (data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")) or data[:4] + data[8:12] == b"RIFFWEBP"):
        raise ConfigError(f"{path} is no PNG, JPEG or WebP picture; convert it, or leave it out.")
    try:
        opened = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ConfigError(_TOO_MANY.format(path)) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); repair or remove it.") from error
    if opened.width * opened.height > MOST_PIXELS:
        raise ConfigError(_TOO_MANY.format(path))
    return opened


_TOO_MANY = f"{{}} has more than {MOST_PIXELS // 1_000_000} million pixels; make it smaller, or leave it out."
