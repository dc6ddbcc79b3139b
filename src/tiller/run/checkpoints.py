"""Checkpoints: safetensors and JSON, with a manifest of sizes and hashes, there as a whole or not at all."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiller.run.files import TEMPORARY, reached, sha256, sync, to_json, write_file, writing
from tiller.state import TrainState

NAME = re.compile(r"epoch-(\d{6,})")
TENSORS, DATA, MANIFEST = "state.safetensors", "state.json", "manifest.json"


class Damaged(Exception):
    """A checkpoint is not what was written; the message names the file."""


@dataclass(frozen=True)
class Snapshot:
    """A training state at the end of an epoch, on the CPU, that later training does not change."""

    tensors: Mapping[str, Tensor]
    data: Mapping[str, Any]

    @classmethod
    def of(cls, state: TrainState) -> Snapshot:
        """A copy of a state."""
        tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.tensors().items()}
        return cls(tensors, copy.deepcopy(state.data()))

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return int(self.data["epoch"])


def listed(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first. Unfinished ones have other names."""
    found = [path for path in folder.glob("epoch-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=epoch_of)


def epoch_of(checkpoint: Path) -> int:
    """The epoch in a checkpoint's name."""
    match = NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])


def save(folder: Path, snapshot: Snapshot, keep_last: int) -> Path:
    """Write a checkpoint beside its final name, move it there, and only then remove those beyond the last few.

    Raises:
        RunError: it cannot be written; what was there before still is.
    """
    final = folder / f"epoch-{snapshot.epoch:06d}"
    temporary = folder / f"{TEMPORARY}{final.name}"
    if final.exists():
        return final  # an epoch has one outcome
    with writing(final):
        try:
            folder.mkdir(exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            reached("mkdir")
            _fill(temporary, snapshot)
            os.replace(temporary, final)
            reached("replace")
            sync(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        for old in listed(folder)[:-keep_last]:
            _remove(old)
    return final


def _fill(folder: Path, snapshot: Snapshot) -> None:
    save_file(dict(snapshot.tensors), folder / TENSORS)
    reached(f"write {TENSORS}")
    sync(folder / TENSORS)
    write_file(folder / DATA, to_json(snapshot.data))
    files = {
        name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size} for name in (DATA, TENSORS)
    }
    write_file(folder / MANIFEST, to_json({"epoch": snapshot.epoch, "files": files}))
    sync(folder)


def _remove(checkpoint: Path) -> None:
    """Take it out of the list first, so that half a checkpoint never stands in it."""
    doomed = checkpoint.with_name(TEMPORARY + checkpoint.name)
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(checkpoint, doomed)
    reached(f"retire {checkpoint.name}")
    shutil.rmtree(doomed)
    reached(f"remove {checkpoint.name}")


def load(checkpoint: Path) -> Snapshot:
    """Read a checkpoint, every byte of it checked against the manifest first. Nothing in it can run code.

    Raises:
        Damaged: a file is missing, cut short or changed.
    """
    for name, expected in _manifest(checkpoint).items():
        path = checkpoint / name
        if not path.is_file():
            raise Damaged(f"{path} is missing")
        if path.stat().st_size != expected["bytes"] or sha256(path) != expected["sha256"]:
            raise Damaged(f"{path} is not what {MANIFEST} says")
    try:
        data = json.loads((checkpoint / DATA).read_bytes())
        snapshot = Snapshot(load_file(checkpoint / TENSORS), data)
        epoch = snapshot.epoch
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise Damaged(f"{checkpoint} cannot be read ({error})") from error
    if epoch != epoch_of(checkpoint):
        raise Damaged(f"{checkpoint / DATA} is of epoch {epoch}")
    return snapshot


def _manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest's files, if the manifest is, byte for byte, one that `save` writes."""
    path = checkpoint / MANIFEST
    try:
        text = path.read_bytes()
        files = json.loads(text)["files"]
        whole = to_json({"epoch": epoch_of(checkpoint), "files": files}) == text and sorted(files) == sorted(
            (DATA, TENSORS)
        )
        whole = whole and all(sorted(entry) == ["bytes", "sha256"] for entry in files.values())
    except FileNotFoundError as error:
        raise Damaged(f"{path} is missing") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{path} is not as it was written") from error
    if not whole:
        raise Damaged(f"{path} is not as it was written")
    return dict(files)


def put_aside(checkpoint: Path) -> None:
    """Take a damaged checkpoint out of the list, but keep it."""
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    with writing(aside):
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(checkpoint, aside)
