"""scores.jsonl: every score of every picture drawn, one line each.

    {"epoch": 3, "prompt": "a cat", "sample": 17, "total": 0.61, "components": {"clip_score": 0.31, "aesthetic": 5.4}}

`sample` is the number of the picture among those of its prompt; with the run's seed it says which noise it was made of.
A missing score is null, with its "reason"; a "note" is what the reward said of the picture. When the file has grown to
64 MB it is renamed to scores-000123.jsonl, after the last epoch in it, and a new one begun; the last three are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tiller.run import lines
from tiller.run.files import sync, writing
from tiller.types import Scores

SCORES = "scores.jsonl"
LARGEST = 64_000_000  # bytes of one file
KEPT = 3  # full files
TEXT = 4_000  # characters of a reason or a note


def append(folder: Path, epoch: int, prompts: Sequence[str], samples: Sequence[int], scores: Scores) -> None:
    """Write an epoch's scores.

    Raises:
        RunError: there is no room.
    """
    path = folder / SCORES
    with writing(path):
        if path.exists() and path.stat().st_size >= LARGEST:
            path.rename(folder / f"scores-{epoch - 1:06d}.jsonl")
            for old in _full(folder)[:-KEPT]:
                old.unlink()
    lines.extend(path, _entries(epoch, prompts, samples, scores))


def cut(folder: Path, epoch: int | None) -> None:
    """Keep what belongs to epochs up to this one; None keeps nothing."""
    for path in [*_full(folder), folder / SCORES]:
        lines.cut(path, epoch)
        if path.name != SCORES and not path.stat().st_size:
            path.unlink()


def flush(folder: Path) -> None:
    """Bring the scores to the disk.

    Raises:
        RunError: that failed.
    """
    path = folder / SCORES
    with writing(path):
        if path.exists():
            sync(path)


def _full(folder: Path) -> list[Path]:
    """The files that are full, oldest first."""
    return sorted(folder.glob("scores-*.jsonl"))


def _entries(epoch: int, prompts: Sequence[str], samples: Sequence[int], scores: Scores) -> Iterator[dict[str, Any]]:
    for index, (prompt, sample) in enumerate(zip(prompts, samples, strict=True)):
        entry: dict[str, Any] = {"epoch": epoch, "prompt": prompt, "sample": sample}
        entry["total"] = _number(scores.values[index])
        if scores.components:
            entry["components"] = {name: _number(column[index]) for name, column in scores.components.items()}
        if index in scores.reasons:
            entry["reason"] = scores.reasons[index][:TEXT]
        if index in scores.notes:
            entry["note"] = scores.notes[index][:TEXT]
        yield entry


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
