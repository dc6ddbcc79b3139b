"""Pictures with a list of what they are of, so that they can be put beside each other later (`tiller vote`)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from tiller.run.files import TEMPORARY, replace_file
from tiller.vote.contest import LIST

MODELS = {"first": "base", "last": "tuned"}  # folders of a run's pictures, and whose they are


def write_list(folder: Path, entries: Sequence[tuple[str, str, str]]) -> None:
    """Write `folder`/pictures.jsonl: (file, prompt, model) of each picture; the model may be empty."""
    lines = [json.dumps({"file": file, "prompt": text, "model": model}) for file, text, model in entries]
    replace_file(folder / LIST, "".join(f"{line}\n" for line in lines).encode())


def write_shown(folder: Path, name: str, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> None:
    """Write a run's `first` or `last` pictures into a folder of that name, and list them; `last` come after `first`.

    A picture is there as a whole or not at all.
    """
    (folder / name).mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        temporary = folder / name / f"{TEMPORARY}{number:03d}.png"
        picture.save(temporary)
        os.replace(temporary, folder / name / f"{number:03d}.png")
    names = list(MODELS)[: list(MODELS).index(name) + 1]
    write_list(
        folder,
        [(f"{one}/{number:03d}.png", text, MODELS[one]) for one in names for number, text in enumerate(prompts)],
    )
