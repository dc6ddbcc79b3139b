"""`tiller prompts KIND FILE.jsonl`: prompts that a language model writes, or that differ from others in one word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiller import prompts
from tiller.prompts import contrast, synthesis
from tiller.prompts.sets import training
from tiller.prompts.synthesis import Rules, Sieve
from tiller.prompts.writer import Writer, make_writer
from tiller.types import ConfigError, Prompt

KINDS = ("new", "vary", "contrast")


@dataclass(frozen=True)
class Wanted:
    """What to write, and who writes it."""

    model: str | None = None  # a chat model: a folder, a name on the hub, or the server's name for it
    revision: str | None = None  # of a hub model
    url: str | None = None  # of an OpenAI-compatible server; None runs the model in this process
    token_env: str | None = None  # the environment variable that holds the server's token
    temperature: float = 1.0
    seed: int = 0
    topic: str | None = None  # of new prompts
    source: str | None = None  # prompts to start from: a set, a .txt or a .jsonl; of new ones the examples
    count: int = 100  # of new prompts
    per_prompt: int = 4  # variations, or changed prompts, of each prompt of the source
    held_out: str | None = None  # a set or a file of prompts that none may be close to
    rules: Rules = field(default_factory=Rules)

    def __post_init__(self) -> None:
        if self.count < 1 or self.per_prompt < 1 or self.temperature < 0:
            raise ConfigError("count and per_prompt must be at least 1, and temperature at least 0.")


def run(kind: str, path: Path, wanted: Wanted) -> int:
    """Write the prompts, and say how many were kept and why others were not."""
    if path.suffix != ".jsonl":
        raise ConfigError(f"{path} must end in .jsonl, for a recipe to read it.")
    if path.exists():
        raise ConfigError(f"{path} is there already; name another file.")
    source = prompts.load(wanted.source) if wanted.source else []
    apart, forbidden = kept_apart(wanted.held_out)
    rules = Rules(wanted.rules.longest, wanted.rules.closeness, (*wanted.rules.forbidden, *forbidden))
    if kind == "contrast":
        writer = _writer(wanted) if wanted.model else None
        kept = contrast.contrasted(_needed(source, kind), wanted.per_prompt, wanted.seed, writer)
        print(f"{len(kept)} prompts, of {len(source)}, have changed ones")
    else:
        kept = _written(kind, wanted, source, Sieve(rules, apart, [p.text for p in source], kind == "vary"))
    synthesis.write(kept, path)
    print(f"{path} holds {len(kept)} prompts; `prompts: {path}` in a recipe reads them")
    return 0


def _written(kind: str, wanted: Wanted, source: list[Prompt], sieve: Sieve) -> list[Prompt]:
    writer = _writer(wanted)
    provenance = _provenance(kind, wanted)
    if kind == "new":
        if not wanted.topic:
            raise ConfigError("new prompts need a topic; give topic='animals at work'.")
        examples = [prompt.text for prompt in source]
        harvest = synthesis.invent(writer, sieve, wanted.topic, wanted.count, examples, provenance, wanted.seed)
    else:
        harvest = synthesis.vary(writer, sieve, _needed(source, kind), wanted.per_prompt, provenance)
    for why, count in harvest.refused.most_common():
        print(f"{count} refused: {why}")
    return harvest.prompts


def _needed(source: list[Prompt], kind: str) -> list[Prompt]:
    if not source:
        raise ConfigError(f"{kind} needs prompts to start from; give source=animal_activities, or a file.")
    return source


def _writer(wanted: Wanted) -> Writer:
    if not wanted.model:
        raise ConfigError("somebody has to write; give model=FOLDER, or model=NAME url=http://127.0.0.1:8000/v1.")
    return make_writer(wanted.model, wanted.revision, wanted.url, wanted.token_env, wanted.seed, wanted.temperature)


def _provenance(kind: str, wanted: Wanted) -> dict[str, Any]:
    """Where a prompt came from, for its metadata."""
    known = {"kind": kind, "model": wanted.model, "revision": wanted.revision}
    return known | {"served": wanted.url is not None, "temperature": wanted.temperature, "seed": wanted.seed}


def kept_apart(held_out: str | None) -> tuple[Sequence[str], Sequence[str]]:
    """The prompts that are held out, and of a built-in set the words that only its unseen splits name.

    The split `trained` of a set is a sample of what is trained on, so it is not kept apart.
    """
    if held_out is None:
        return (), ()
    if held_out not in prompts.SETS:
        return [prompt.text for prompt in prompts.load(held_out)], ()
    splits = prompts.held_out(held_out)
    unseen = [prompt for name, split in splits.items() if name != "trained" for prompt in split]
    return [prompt.text for prompt in unseen], sorted(_named(unseen) - _named(training(held_out)))


def _named(found: Sequence[Prompt]) -> set[str]:
    return {str(prompt.metadata[key]) for prompt in found for key in ("noun", "activity") if key in prompt.metadata}
