"""Prompts from a list, a text file, a JSONL file, or a built-in set."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path

from tiller.prompts.sets import SETS, training
from tiller.types import ConfigError, Prompt


def load(spec: str | Path | Iterable[str | Prompt]) -> list[Prompt]:
    """The prompts that `spec` names, at least one.

    - the name of a built-in set (`animals`, `animal_activities`, ...; see `tiller.prompts.SETS`)
    - a `.txt` file: one prompt per line; blank lines and lines that begin with # are skipped
    - a `.jsonl` file: one object per line, `{"prompt": "a cat", ...}`; the other keys become the metadata
    - a list of texts or `Prompt`s

    Raises `ConfigError`, naming the file and line, if there is nothing there or it cannot be read.
    """
    if isinstance(spec, str) and spec in SETS:
        return training(spec)
    if isinstance(spec, (str, Path)):
        return _from_file(Path(spec))
    prompts = [_from_item(item, index) for index, item in enumerate(spec)]
    if not prompts:
        raise ConfigError("the list of prompts is empty; give at least one.")
    return prompts


def _from_item(item: object, index: int) -> Prompt:
    if isinstance(item, Prompt):
        return item
    if isinstance(item, str) and item.strip():
        return Prompt(item)
    raise ConfigError(f"prompt {index} of the list is {item!r}; give a text that is not empty, or a Prompt.")


def _from_file(path: Path) -> list[Prompt]:
    read = {".txt": _text_lines, ".jsonl": _json_lines}.get(path.suffix.lower())
    if not path.is_file():
        raise ConfigError(_nothing_there(path))
    if read is None:
        raise ConfigError(f"the prompt file {path} is neither .txt (one prompt per line) nor .jsonl; rename it.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt file {path} is not UTF-8 text; convert it.") from error
    except OSError as error:
        raise ConfigError(f"the prompt file {path} cannot be read: {error.strerror}.") from error
    prompts = list(read(path, text))
    if not prompts:
        raise ConfigError(f"the prompt file {path} has no prompts; write one per line.")
    return prompts


def _nothing_there(path: Path) -> str:
    if path.is_dir():
        return f"the prompts {path} are a folder; name a .txt or .jsonl file in it."
    if path.suffix or len(path.parts) > 1:
        return f"there is no prompt file {path}; a path starts at the working directory."
    close = get_close_matches(str(path), SETS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"name a .txt or .jsonl file, or {', '.join(SETS)}."
    return f"there are no prompts called {str(path)!r}; {hint}"


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without outer blanks) of every line that is not blank."""
    return ((number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip())


def _text_lines(path: Path, text: str) -> Iterator[Prompt]:
    return (Prompt(line) for _, line in _lines(text) if not line.startswith("#"))


def _json_lines(path: Path, contents: str) -> Iterator[Prompt]:
    for number, line in _lines(contents):
        where = f"{path}:{number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{where} is not JSON ({error}); write one object per line.") from error
        text = entry.get("prompt") if isinstance(entry, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f'{where} has no prompt; write {{"prompt": "a cat"}}.')
        yield Prompt(text, {key: value for key, value in entry.items() if key != "prompt"})
