"""Prompt suites in the shapes of the field's benchmarks, one JSON object per line.

DrawBench:    {"Prompts": "A red car.", "Category": "Colors"}
PartiPrompts: {"Prompt": "bond", "Category": "Abstract", "Challenge": "Basic"}
GenEval:      {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "a photo of two cats"}
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tiller.prompts.sets import SETS
from tiller.prompts.sources import load
from tiller.types import ConfigError, Prompt

TEXT = ("prompt", "Prompt", "Prompts", "caption", "text")
CATEGORY = ("category", "Category", "tag", "split")
ALL = "all"


@dataclass(frozen=True)
class Asked:
    """One prompt of a suite, and the category its score is counted in."""

    prompt: Prompt
    category: str


def read(source: str | Path) -> list[Asked]:
    """A suite's prompts. The metadata of each is its whole line, so that a reward such as `geneval` finds its columns.

    Args:
        source: a .jsonl file in one of the shapes above, or anything that `tiller.prompts.load` takes.

    Raises:
        ConfigError: the file is not there, a line is no JSON object, or it holds no prompt.
    """
    path = Path(source)
    if str(source) in SETS or path.suffix.lower() != ".jsonl" or not path.is_file():
        return [Asked(prompt, ALL) for prompt in load(source)]
    asked = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            asked.append(_one(f"{path}:{number}", line))
    if not asked:
        raise ConfigError(f"the suite {path} has no prompts; write one JSON object per line.")
    return asked


def _one(where: str, line: str) -> Asked:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON ({error}); write one object per line.") from error
    found = next((key for key in TEXT if isinstance(entry, dict) and isinstance(entry.get(key), str)), None)
    if found is None or not entry[found].strip():
        raise ConfigError(f'{where} has no prompt; write {{"prompt": "a cat"}} (or {", ".join(TEXT[1:])}).')
    category = next((str(entry[key]) for key in CATEGORY if entry.get(key)), ALL)
    return Asked(Prompt(entry[found].strip(), entry), category)
