"""What is put to the vote: two pictures of one prompt; and how they are found in a folder or a file."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from tiller.types import ConfigError
from tiller.vote.ledger import Vote, is_votes_file, read
from tiller.vote.pictures import Picture, look_at

T = TypeVar("T")
LIST = "pictures.jsonl"  # beside pictures: {"file", "prompt", "model"} on each line
COLUMNS = (("prompt", "first", "second"), ("prompt", "chosen", "rejected"), ("caption", "jpg_0", "jpg_1"))
LONGEST_LINE, LONGEST_PROMPT = 1 << 16, 4000
_SAMPLE = re.compile(r"(\d{4,})-(.*)-(\d+)\.png")  # as `tiller sample` names them


@dataclass(frozen=True)
class Contest:
    """Two different pictures of a prompt."""

    prompt: str
    first: Picture
    second: Picture

    @cached_property
    def id(self) -> str:
        """Of the prompt and what is in the pictures, whatever their files are called."""
        parts = repr((self.prompt, self.first.sha256, self.second.sha256))
        return hashlib.sha256(parts.encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Drawn:
    """A picture with the prompt that it was drawn for."""

    prompt: str
    picture: Picture


def rounds(items: Sequence[T]) -> Iterator[list[tuple[T, T]]]:
    """All pairs of items, in rounds: each item with its neighbour, then with the one after that ...

    In a round everyone meets two others (in the last one of an even number, one): to stop after any round is fair.
    """
    count = len(items)
    for step in range(1, count // 2 + 1):
        pairs = [(items[at], items[(at + step) % count]) for at in range(count)]
        yield pairs[: count // 2] if 2 * step == count else pairs


def find(source: Path, against: Path | None = None, keep: Path | None = None, seed: int = 0) -> list[Contest]:
    """The contests in a run folder, a folder of pictures or a .jsonl of pairs, in an order of the seed's.

    Of one folder, pictures of a prompt meet those of other models where they tell of several (a run's base and tuned
    one, which have the noise in common), and each other otherwise. With `against`, one folder's meet the other's.

    Args:
        keep: a folder for copies of pictures that may be drawn over, as a run's last ones are.

    Raises:
        ConfigError: there is nothing to compare, a line is not as it should be, or a picture cannot be shown.
    """
    if source.is_file():
        if against is not None:
            raise ConfigError("--against takes two folders of pictures; leave it out for a file of pairs.")
        found = list(_of_votes(source) if is_votes_file(source) else _of_lines(source))
    elif source.is_dir():
        drawn = _drawn(source, keep)
        if against is not None:
            theirs = _drawn(against, keep)
            drawn = [*_labelled(drawn, f"{source}"), *_labelled(theirs, f"{against}")]
        found = list(_met(drawn))
    else:
        raise ConfigError(f"there is no {source}; give a run folder, a folder of tiller sample, or a .jsonl of pairs.")
    unique = {frozenset((one.prompt, one.first.sha256, one.second.sha256)): one for one in reversed(found)}
    different = [one for one in reversed(unique.values()) if one.first.sha256 != one.second.sha256]
    if not different:
        raise ConfigError(
            f"{source} holds no two different pictures of one prompt; draw some with tiller sample {source} "
            "--per-prompt 2, and vote on these."
        )
    return _shuffled(different, seed) if source.is_file() else different


def drawn_in(folder: Path) -> list[Drawn]:
    """All pictures of a folder, also those that have nothing to be compared with.

    Raises:
        ConfigError: there are none, or one cannot be shown.
    """
    found = _drawn(folder, None) if folder.is_dir() else []
    if not found:
        raise ConfigError(f"{folder} holds no pictures with prompts; give a folder that tiller sample wrote.")
    return found


def _drawn(folder: Path, keep: Path | None) -> list[Drawn]:
    """The pictures of a folder, with prompts."""
    inside = folder / "images"
    if (inside / LIST).is_file():
        found = list(_listed(inside))
        return found if keep is None else [replace(one, picture=_kept(one.picture, keep)) for one in found]
    if (folder / LIST).is_file():
        return list(_listed(folder))
    named = sorted((path, match) for path in folder.glob("*.png") if (match := _SAMPLE.fullmatch(path.name)))
    return [Drawn(match[2].replace("-", " "), look_at(path)) for path, match in named]


def _listed(folder: Path) -> Iterator[Drawn]:
    for number, entry in _lines(folder / LIST):
        where = f"{folder / LIST}, line {number}"
        prompt, name = _text(entry, "prompt", where), _text(entry, "file", where)
        yield Drawn(_bounded(prompt, where), look_at(folder / name, str(entry.get("model") or "")))


def _kept(picture: Picture, folder: Path) -> Picture:
    """The picture in a file of its own content's name, which nothing draws over."""
    path = folder / f"{picture.id}{picture.path.suffix}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(picture.path, path)
    kept = look_at(path, picture.source)
    if kept.sha256 != picture.sha256:
        raise ConfigError(f"{picture.path} is being drawn over; wait for the run to be done with it, then try again.")
    return kept


def _labelled(drawn: Iterable[Drawn], label: str) -> list[Drawn]:
    """With several models in one folder, its last one's pictures are taken: those of the tuned one."""
    drawn = list(drawn)
    last = drawn[-1].picture.source if drawn else ""
    return [replace(one, picture=replace(one.picture, source=label)) for one in drawn if one.picture.source == last]


def _met(drawn: Sequence[Drawn]) -> Iterator[Contest]:
    """Who meets whom: one contest of every prompt, then a second of every prompt ..."""
    of_prompts: dict[str, dict[str, list[Picture]]] = {}
    for one in drawn:
        of_prompts.setdefault(one.prompt, {}).setdefault(one.picture.source, []).append(one.picture)
    queues = [_of_prompt(prompt, list(models.values())) for prompt, models in of_prompts.items()]
    for turn in zip_longest(*queues):
        yield from (contest for contest in turn if contest is not None)


def _of_prompt(prompt: str, models: list[list[Picture]]) -> Iterator[Contest]:
    if len(models) == 1:
        pairs = (pair for pairs in rounds(models[0]) for pair in pairs)
    else:
        pairs = (
            (one, other)
            for pairing in rounds(models)
            for ours, theirs in pairing
            for one, other in zip(ours, theirs, strict=False)
        )
    return (Contest(prompt, one, other) for one, other in pairs)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
            where = f"{path}, line {number}"
            if len(line) > LONGEST_LINE:
                raise ConfigError(f"{where}: longer than {LONGEST_LINE} bytes; shorten or remove it.")
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{where}: no JSON ({error}).") from error
            if not isinstance(entry, dict):
                raise ConfigError(f"{where}: no JSON object.")
            yield number, entry


def _of_votes(path: Path) -> Iterator[Contest]:
    for vote in read(path)[0]:
        if isinstance(vote, Vote):
            first = look_at(path.parent / vote.first, vote.first_from)
            yield Contest(vote.prompt, first, look_at(path.parent / vote.second, vote.second_from))


def _of_lines(path: Path) -> Iterator[Contest]:
    return (_in_line(entry, path, number) for number, entry in _lines(path))


def _in_line(entry: dict[str, Any], path: Path, number: int) -> Contest:
    where = f"{path}, line {number}"
    names = next((names for names in COLUMNS if set(names) <= set(entry)), None)
    if names is None:
        raise ConfigError(f"{where}: each line needs prompt, first and second, or prompt, chosen and rejected.")
    prompt, *files = (_text(entry, name, where) for name in names)
    try:
        first, second = (look_at(path.parent / file) for file in files)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return Contest(_bounded(prompt, where), first, second)


def _text(entry: dict[str, Any], name: str, where: str) -> str:
    if not isinstance(entry.get(name), str):
        raise ConfigError(f"{where}: {name} is missing, or no text.")
    return entry[name]


def _bounded(prompt: str, where: str) -> str:
    if len(prompt) > LONGEST_PROMPT:
        raise ConfigError(f"{where}: the prompt has more than {LONGEST_PROMPT} characters; shorten it.")
    return prompt


def _shuffled(contests: list[Contest], seed: int) -> list[Contest]:
    """Neighbours in a file are often alike. All raters get the same order, and so the same contests first."""
    order = list(contests)
    random.Random(seed).shuffle(order)
    return order
