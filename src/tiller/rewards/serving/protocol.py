"""The wire format between a run and a reward server: JSON and base64, checked on both sides, never a pickle.

    POST /v1/score   {"schema": 1, "images": [base64 PNG, WebP or JPEG], "prompts": [str], "metadata": [object]}
      -> 200         {"schema": 1, "results": [{"index": 0, "value": number or null, "reason": str, "note": str,
                      "parts": {name: number or null}}], "reward": {"name": str, "version": str}}
      -> 4xx, 5xx    {"schema": 1, "error": str}

`index`, `reason`, `note` and `parts` may be left out; without `index` there must be one result per picture, in order.
Where there are `parts`, `value` is their sum.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

SCHEMA = 1
FORMATS = ("png", "webp", "jpeg")
REASON, NOTE = 500, 4000  # characters that are kept
VALUES = 1_000_000  # in one JSON text; each is an object in memory, much larger than its two bytes of text


class Malformed(Exception):
    """A message that does not keep to the format; its text says how."""


@dataclass(frozen=True)
class Limits:
    """What a server takes in one request."""

    body: int = 128 * 2**20  # bytes
    pictures: int = 128
    pixels: int = 4096 * 4096  # of one picture
    total_pixels: int = 128 * 1024 * 1024  # of all of them; 3 bytes each once decoded


@dataclass(frozen=True)
class Request:
    """N pictures to score."""

    images: list[Image.Image]
    prompts: list[str]
    metadata: list[dict[str, Any]]


@dataclass(frozen=True)
class Result:
    """What a reward says of one picture."""

    value: float | None  # None is missing
    reason: str = ""  # why it is missing
    note: str = ""
    parts: Mapping[str, float | None] = field(default_factory=dict)  # where the reward names several scores


def encode_picture(image: Image.Image, kind: str = "png", quality: int = 95) -> bytes:
    """An RGB picture in a file's bytes; png and webp lose nothing."""
    file = io.BytesIO()
    settings: dict[str, dict[str, Any]] = {
        "png": {"compress_level": 1},  # the fastest: it goes over the wire once
        "webp": {"lossless": True, "quality": 0, "method": 0},
        "jpeg": {"quality": quality, "subsampling": 0},
    }
    image.convert("RGB").save(file, kind, **settings[kind])
    return file.getvalue()


def write_request(
    images: Sequence[Image.Image], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]], kind: str
) -> bytes:
    """The body of a request. Raises ValueError or TypeError if the metadata is no JSON."""
    pictures = [base64.b64encode(encode_picture(image, kind)).decode() for image in images]
    message = {"schema": SCHEMA, "images": pictures, "prompts": list(prompts), "metadata": [dict(m) for m in metadata]}
    return json.dumps(message, allow_nan=False).encode()


def read_request(body: bytes, limits: Limits) -> Request:
    """The pictures of a request, each checked for kind and size before it is decoded.

    Raises:
        Malformed: it keeps not to the format or the limits.
    """
    message = read_json(body)
    schema = message.get("schema")
    if schema != SCHEMA or isinstance(schema, bool):
        raise Malformed(f"the request has schema {plain(repr(schema), 40)} and this server reads {SCHEMA}")
    images, prompts, metadata = (message.get(key) for key in ("images", "prompts", "metadata"))
    if unknown := set(message) - {"schema", "images", "prompts", "metadata"}:
        raise Malformed(f"the request holds {plain(repr(min(unknown)), 40)}, which schema {SCHEMA} does not know")
    if not isinstance(images, list) or not isinstance(prompts, list) or not isinstance(metadata, list):
        raise Malformed("images, prompts and metadata must be lists")
    if not len(images) == len(prompts) == len(metadata):
        raise Malformed(f"{len(images)} images, {len(prompts)} prompts and {len(metadata)} metadata are not one each")
    if len(images) > limits.pictures:
        raise Malformed(f"{len(images)} pictures are more than the {limits.pictures} that one request may hold")
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise Malformed("each prompt must be a text")
    if not all(isinstance(entry, dict) for entry in metadata):
        raise Malformed("each entry of metadata must be an object")
    opened = [_open(index, text, limits) for index, text in enumerate(images)]
    total = sum(image.width * image.height for image in opened)
    if total > limits.total_pixels:
        raise Malformed(f"{total} pixels are more than the {limits.total_pixels} that one request may hold")
    return Request([_decode(index, image) for index, image in enumerate(opened)], prompts, metadata)


def _open(index: int, text: Any, limits: Limits) -> Image.Image:
    """A picture's head alone: its kind and size are known, no pixel is decoded."""
    if not isinstance(text, str):
        raise Malformed(f"image {index} is no base64 text")
    try:
        file = io.BytesIO(base64.b64decode(text, validate=True))
    except ValueError as error:  # binascii.Error is one
        raise Malformed(f"image {index} is no base64 text") from error
    try:
        image = Image.open(file, formats=[kind.upper() for kind in FORMATS])
    except Image.DecompressionBombError as error:
        raise Malformed(f"image {index} has more pixels than the {limits.pixels} allowed") from error
    except Exception as error:  # Pillow's readers raise whatever a broken file makes them raise
        raise Malformed(f"image {index} is no picture in one of the formats {', '.join(FORMATS)}") from error
    if image.width * image.height > limits.pixels:
        raise Malformed(f"image {index} has {image.width}x{image.height} pixels, more than the {limits.pixels} allowed")
    return image


def _decode(index: int, image: Image.Image) -> Image.Image:
    try:
        return image.convert("RGB")
    except Exception as error:  # as above
        raise Malformed(f"image {index} is damaged") from error


def write_answer(results: Sequence[Result], reward: Mapping[str, Any]) -> bytes:
    """The body of an answer to a request."""
    rows = [_row(index, result) for index, result in enumerate(results)]
    return json.dumps({"schema": SCHEMA, "results": rows, "reward": dict(reward)}, allow_nan=False).encode()


def _row(index: int, result: Result) -> dict[str, Any]:
    row: dict[str, Any] = {"index": index, "value": result.value}
    if result.reason:
        row["reason"] = result.reason[:REASON]
    if result.note:
        row["note"] = result.note[:NOTE]
    if result.parts:
        row["parts"] = dict(result.parts)
    return row


def read_answer(body: bytes, count: int) -> tuple[dict[int, Result], dict[str, Any]]:
    """The results by the picture's number, perhaps not of all `count` pictures, and what the reward is.

    Raises:
        Malformed: it keeps not to the format; nothing of it can be believed.
    """
    message = read_json(body)
    rows, reward = message.get("results"), message.get("reward", {})
    if message.get("schema") != SCHEMA or isinstance(message.get("schema"), bool):
        raise Malformed(f"the answer has schema {plain(repr(message.get('schema')), 40)}, not {SCHEMA}")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise Malformed("the answer holds no list of results")
    if not isinstance(reward, dict):
        raise Malformed("the answer says oddly what its reward is")
    numbers = [row.get("index") for row in rows]
    if all(number is None for number in numbers):
        if len(rows) != count:
            raise Malformed(f"the answer holds {len(rows)} results for {count} pictures")
        numbers = list(range(count))
    if not all(type(number) is int and 0 <= number < count for number in numbers):
        raise Malformed("the answer numbers its results oddly")
    if len(set(numbers)) < len(numbers):
        raise Malformed("the answer holds two results for one picture")
    return {number: _result(row) for number, row in zip(numbers, rows, strict=True)}, reward


def _result(row: Mapping[str, Any]) -> Result:
    parts, reason, note = row.get("parts", {}), row.get("reason", ""), row.get("note", "")
    if "value" not in row:
        raise Malformed("the answer holds a result without a value")
    if not isinstance(parts, dict) or not isinstance(reason, str) or not isinstance(note, str):
        raise Malformed("the answer holds a result of another shape")
    scores = {name: _number(part) for name, part in parts.items()}
    result = Result(_number(row["value"]), plain(reason, REASON), note[:NOTE], scores)
    if parts and not _same(result.value, total(scores)):
        raise Malformed("the answer holds a value that is not the sum of its parts")
    return result


def total(parts: Mapping[str, float | None]) -> float | None:
    """The sum of named scores; missing where one of them is."""
    there = [part for part in parts.values() if part is not None]
    return math.fsum(there) if len(there) == len(parts) else None


def _same(value: float | None, other: float | None) -> bool:
    return value == other if value is None or other is None else math.isclose(value, other, abs_tol=1e-9)


def _number(value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise Malformed(f"the answer holds {plain(repr(value), 40)} in the place of a score")
    return number


def read_json(body: bytes) -> dict[str, Any]:
    """One JSON object, of bounded cost. Raises Malformed for anything else, NaN and Infinity included."""
    if sum(body.count(mark) for mark in (b"{", b"[", b",")) > VALUES:
        raise Malformed("the message holds too many values")
    try:
        message = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"the message is no JSON ({plain(str(error), 80)})") from error
    if not isinstance(message, dict):
        raise Malformed("the message is no JSON object")
    return message


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def plain(text: str, length: int) -> str:
    """Another party's words, on one line and without signs that steer a terminal."""
    words = "".join(letter if letter.isprintable() else " " for letter in text[: 4 * length])
    short = " ".join(words.split())
    return short if len(short) <= length else short[: length - 3] + "..."
