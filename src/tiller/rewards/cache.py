"""Scores that need no second asking: kept in the run folder, by picture, prompt and what the reward is.

For rewards that say `deterministic = True`. A missing score is never kept, so it is asked for again. The file is an
SQLite database: each call is one transaction, so a kill leaves all of its scores or none. It is a cache and nothing
more: when it cannot be read or written, the reward is asked.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sqlite3
import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from tiller.rewards.call import Reward, relative, reward_name, workers
from tiller.rewards.contract import score
from tiller.rewards.gradient import differentiable
from tiller.rewards.mix import parts_of
from tiller.types import Scores

LIMIT = 50_000  # scores that are kept; the oldest go first
NOTE = 2_000  # characters of a note that are kept with a score


class Store:
    """Texts by key in a file that is made when it is first needed; bounded, and safe to use from several threads."""

    def __init__(self, path: Path, limit: int = LIMIT) -> None:
        self.path, self.limit = path, limit
        self.hits = self.misses = 0
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None
        self._broken = False

    def get(self, keys: Sequence[str]) -> list[str | None]:
        """The text of each key, None where there is none."""
        with self._lock:
            found = self._try(lambda database: [self._one(database, key) for key in keys]) or [None] * len(keys)
            known = sum(text is not None for text in found)
            self.hits, self.misses = self.hits + known, self.misses + len(keys) - known
        return found

    def put(self, entries: Mapping[str, str]) -> None:
        """Keep all of these, and let go of the oldest beyond the limit."""
        with self._lock:
            self._try(lambda database: self._write(database, entries))

    def count(self) -> tuple[int, int]:
        """How many keys were there and how many were not, since this was last asked."""
        with self._lock:
            found = self.hits, self.misses
            self.hits = self.misses = 0
        return found

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            if self._database is not None:
                self._database.close()
            self._database = None

    @staticmethod
    def _one(database: sqlite3.Connection, key: str) -> str | None:
        row = database.execute("SELECT text FROM scores WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def _write(self, database: sqlite3.Connection, entries: Mapping[str, str]) -> None:
        with database:  # one transaction
            database.executemany("INSERT OR REPLACE INTO scores (key, text) VALUES (?, ?)", entries.items())
            database.execute(
                "DELETE FROM scores WHERE number <= (SELECT max(number) FROM scores) - ?",
                (self.limit,),
            )

    def _try(self, work: Any) -> Any:
        """What the work gives; None, and no further attempts, where the file fails it."""
        if self._broken:
            return None
        try:
            if self._database is None:
                self._database = self._open()
            return work(self._database)
        except (sqlite3.Error, OSError, UnicodeError):
            self._broken = True
            return None

    def _open(self) -> sqlite3.Connection:
        try:
            return self._connect()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # no permission, no room, in use
                raise
            self.path.unlink()  # it is no database, or a damaged one
            return self._connect()

    def _connect(self) -> sqlite3.Connection:
        database = sqlite3.connect(self.path, check_same_thread=False, timeout=5)
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute(
            "CREATE TABLE IF NOT EXISTS scores (number INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT UNIQUE, text TEXT)"
        )
        return database


@dataclass(frozen=True)
class Cached:
    """A reward that is asked only for what the store does not know."""

    reward: Reward
    store: Store
    identity: str  # of the reward: see `identity_of`

    def scores(
        self,
        images: Sequence[Image],
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
        groups: Sequence[Hashable] | None = None,
    ) -> Scores:
        """N checked scores; those that are not known are asked for in one call."""
        keys = [self._key(*entry) for entry in zip(images, prompts, metadata, strict=True)]
        known = [_read(text) for text in self.store.get(keys)]
        new = [index for index, entry in enumerate(known) if entry is None]
        asked = score(self.reward, [images[i] for i in new], [prompts[i] for i in new], [metadata[i] for i in new])
        self.store.put({keys[i]: _write(asked, row) for row, i in enumerate(new) if asked.valid[row]})
        for row, index in enumerate(new):
            known[index] = _entry(asked, row)
        return _join([entry for entry in known if entry is not None])

    def __call__(self, *arguments: Any) -> Any:
        """With a graph nothing can be looked up."""
        return self.reward(*arguments)

    @property
    def differentiable(self) -> bool:
        return differentiable(self.reward)

    @property
    def workers(self) -> int:
        return workers(self.reward)

    @property
    def __name__(self) -> str:
        return reward_name(self.reward)

    def _key(self, image: Any, prompt: str, metadata: Mapping[str, Any]) -> str:
        about = json.dumps([self.identity, prompt, dict(metadata)], sort_keys=True, default=repr)
        return hashlib.sha256(f"{picture_hash(image)}\n{about}".encode()).hexdigest()


def cached(reward: Reward, inner: Reward, store: Store | None) -> Reward:
    """`reward` with a cache before it, if it allows that; `inner` is what it is without wrappers of ours."""
    if store is None or not getattr(inner, "deterministic", False) or relative(inner):
        return reward
    return Cached(reward, store, identity_of(inner))


def counts(reward: Reward | None) -> dict[str, float]:
    """How many scores came out of a reward's cache since this was last asked, and how many did not."""
    kept = [part.reward.store for part in parts_of(reward) if isinstance(part.reward, Cached)] if reward else []
    if not kept:
        return {}
    found = [store.count() for store in {id(store): store for store in kept}.values()]
    return {"cache/hits": float(sum(hits for hits, _ in found)), "cache/misses": float(sum(n for _, n in found))}


def identity_of(reward: Reward) -> str:
    """What makes a reward give the scores it gives: its name, its settings, its source, our version.

    One whose scores depend on more than that, such as a file of weights that may change, says so in an attribute
    `identity`.
    """
    kind: Any = reward if inspect.isfunction(reward) else type(reward)
    entries = fields(reward) if is_dataclass(reward) else ()
    settings = {entry.name: getattr(reward, entry.name) for entry in entries if entry.init}
    parts = [kind.__module__, kind.__qualname__, settings, _source(kind), version("tiller")]
    return json.dumps([*parts, getattr(reward, "identity", "")], sort_keys=True, default=repr)


def _source(kind: Any) -> str:
    try:
        return hashlib.sha256(Path(inspect.getsourcefile(kind) or "").read_bytes()).hexdigest()
    except (OSError, TypeError):
        return ""


def picture_hash(picture: Any) -> str:
    """SHA-256 over size, mode and pixels of a picture, or of the frames of a video, or of an array."""
    digest = hashlib.sha256()
    for frame in picture if isinstance(picture, (list, tuple)) else [picture]:
        if not isinstance(frame, Image):
            frame = np.ascontiguousarray(frame)
        mode = frame.mode if isinstance(frame, Image) else str(frame.dtype)
        digest.update(f"{frame.size if isinstance(frame, Image) else frame.shape} {mode}\n".encode())
        digest.update(frame.tobytes())
    return digest.hexdigest()


_Entry = tuple[float, dict[str, float], str, str]  # value, components, reason, note


def _entry(scores: Scores, row: int) -> _Entry:
    parts = {name: float(values[row]) for name, values in scores.components.items()}
    return float(scores.values[row]), parts, scores.reasons.get(row, ""), scores.notes.get(row, "")


def _write(scores: Scores, row: int) -> str:
    value, parts, _, note = _entry(scores, row)
    whole = {name: part if np.isfinite(part) else None for name, part in parts.items()}
    return json.dumps([value, whole, note[:NOTE]])


def _read(text: str | None) -> _Entry | None:
    if text is None:
        return None
    value, parts, note = json.loads(text)
    return value, {name: np.nan if part is None else part for name, part in parts.items()}, "", note


def _join(entries: Sequence[_Entry]) -> Scores:
    names = dict.fromkeys(name for entry in entries for name in entry[1])
    return Scores(
        np.array([entry[0] for entry in entries], dtype=np.float64),
        {name: np.array([entry[1].get(name, np.nan) for entry in entries], dtype=np.float64) for name in names},
        {index: entry[2] for index, entry in enumerate(entries) if entry[2]},
        {index: entry[3] for index, entry in enumerate(entries) if entry[3]},
    )
