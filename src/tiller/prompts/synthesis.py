"""New prompts by a language model, each checked: well formed, different from the others, and far from held-out ones."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tiller.prompts.closeness import Closeness, Known, normalised
from tiller.prompts.writer import Writer
from tiller.rewards.judge.viewer import legible
from tiller.rewards.serving.persistence import Failure
from tiller.types import ConfigError, Prompt

NEW = """Write {number} prompts for a model that draws pictures. Topic: {topic}.
Each describes one picture in plain English, in at most {longest} words. No two of them show the same.
{examples}Write one prompt per line, without numbers, quotation marks or remarks."""

VARIED = """Here is a prompt for a model that draws pictures: {prompt}
Write {number} other wordings of it that describe the same picture, in plain English, in at most {longest} words each.
Write one per line, without numbers, quotation marks or remarks."""

_LEAD = re.compile(r"^\s*(?:[-*•·–]|\(?\d{1,3}[.):]|[a-zA-Z][.)])\s+")
_QUOTES = "\"'“”‘’«»`*"


@dataclass(frozen=True)
class Rules:
    """What a written prompt must be like."""

    longest: int = 20  # words
    closeness: Closeness = field(default_factory=Closeness)  # when two prompts are the same
    forbidden: tuple[str, ...] = ()  # words that must not occur, in the singular or the plural

    def __post_init__(self) -> None:
        if self.longest < 1:
            raise ConfigError(f"longest is {self.longest}; a prompt has at least one word.")


@dataclass
class Harvest:
    """What came of asking: the prompts kept, and why others were not."""

    prompts: list[Prompt] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)


class Sieve:
    """Keeps those of many written prompts that follow the rules."""

    def __init__(
        self, rules: Rules, held_out: Sequence[str] = (), known: Sequence[str] = (), paraphrases: bool = False
    ) -> None:
        """`paraphrases` lets prompts of one meaning pass, if they are worded differently; never those held out."""
        self.rules = rules
        self.harvest = Harvest()
        self._held_out = Known(rules.closeness)
        self._known = Known(replace(rules.closeness, encoder=None) if paraphrases else rules.closeness)
        self._held_out.add(list(held_out))
        self._known.add(list(known))
        self._forbidden = [normalised(word) for word in rules.forbidden]

    def offer(self, text: str, metadata: Mapping[str, Any]) -> bool:
        """Keep a prompt, or count why not."""
        why = self.objection(text)
        if why:
            self.harvest.refused[why] += 1
            return False
        self._known.add([text])
        self.harvest.prompts.append(Prompt(text, dict(metadata)))
        return True

    def objection(self, text: str) -> str:
        """Why a prompt is not kept; empty if it is."""
        split = normalised(text)
        if not split or len(split) > self.rules.longest:
            return "too long" if split else "empty"
        if any(_holds(split, words) for words in self._forbidden):
            return "holds a word that is held out"
        if self._held_out.closest(text) is not None:
            return "close to a held-out prompt"
        return "close to another prompt" if self._known.closest(text) is not None else ""


def _holds(split: Sequence[str], sought: Sequence[str]) -> bool:
    from tiller.emoji.words import plural

    forms = [list(sought), [*sought[:-1], plural(sought[-1])]] if sought else []
    return any(list(split[at : at + len(sought)]) in forms for at in range(len(split)))


def lines(answer: str) -> Iterator[str]:
    """The prompts in a model's answer: its lines without numbers, marks and quotation marks; headings are skipped."""
    for line in answer.splitlines()[:200]:
        text = legible(_LEAD.sub("", line), 300).strip(f"{_QUOTES} ")
        if text and not text.endswith(":"):
            yield text.removesuffix(".").rstrip()


def invent(
    writer: Writer,
    sieve: Sieve,
    topic: str,
    count: int,
    examples: Sequence[str] = (),
    provenance: Mapping[str, Any] | None = None,
    seed: int = 0,
    per_request: int = 10,
    rounds: int = 50,
) -> Harvest:
    """`count` new prompts on a topic, or fewer if `rounds` requests do not bring them.

    Args:
        examples: prompts in the style wanted; each request shows five of them, drawn anew.
        provenance: kept in each prompt's metadata, beside the number of the request.
    """
    chance = random.Random(seed)
    for number in range(rounds):
        if len(sieve.harvest.prompts) >= count:
            break
        shown = chance.sample(list(examples), min(5, len(examples)))
        style = f"In the style of: {'; '.join(shown)}.\n" if shown else ""
        request = NEW.format(number=per_request, topic=topic, longest=sieve.rules.longest, examples=style)
        for text in _answered(writer, request, sieve):
            if len(sieve.harvest.prompts) < count:
                sieve.offer(text, {"synthesis": {**(provenance or {}), "topic": topic, "request": number}})
    return sieve.harvest


def vary(
    writer: Writer,
    sieve: Sieve,
    source: Sequence[Prompt],
    per_prompt: int,
    provenance: Mapping[str, Any] | None = None,
) -> Harvest:
    """Up to `per_prompt` other wordings of each prompt, with that prompt's metadata, for they mean the same."""
    for prompt in source:
        request = VARIED.format(prompt=prompt.text, number=per_prompt, longest=sieve.rules.longest)
        kept = 0
        for text in _answered(writer, request, sieve):
            if kept < per_prompt:
                origin = {**(provenance or {}), "from": prompt.text}
                kept += sieve.offer(text, {**prompt.metadata, "synthesis": origin})
    return sieve.harvest


def _answered(writer: Writer, request: str, sieve: Sieve) -> Iterable[str]:
    answer = writer.ask(None, [request])[0]
    if isinstance(answer, Failure):
        sieve.harvest.refused[f"no answer: {answer.reason}"] += 1
        return ()
    return lines(answer)


def write(prompts: Sequence[Prompt], path: Path) -> None:
    """Prompts as JSONL that `prompts:` of a recipe reads, whole or not at all.

    Raises:
        ConfigError: there are none, or the file is there already.
    """
    if not prompts:
        raise ConfigError("no prompt was kept, so none is written; ask a better model, or loosen the rules.")
    if path.exists():
        raise ConfigError(f"{path} is there already; name another file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(path.name + ".part")
    entries = [json.dumps({"prompt": prompt.text, **prompt.metadata}, ensure_ascii=False) for prompt in prompts]
    half.write_text("\n".join(entries) + "\n", encoding="utf-8")
    half.replace(path)
