"""Contrastive prompts: each with others that show the same scene but for one word, for the `contrast` reward.

The word is changed by lists (animals, objects, activities, numbers, colours, relations of the embedded world), or by a
language model whose changes are checked: exactly one word may differ, articles and the plural aside.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tiller.emoji.words import (
    ACTIVITIES,
    ANIMALS,
    COLOURS,
    NUMBERS,
    OBJECTS,
    RELATIONS,
    UNSEEN_ACTIVITIES,
    article,
    plural,
)
from tiller.prompts.closeness import edit_distance, normalised
from tiller.prompts.synthesis import lines
from tiller.prompts.writer import Writer
from tiller.rewards.serving.persistence import Failure
from tiller.types import Prompt

CLASSES: dict[str, tuple[str, ...]] = {
    "activity": ACTIVITIES + UNSEEN_ACTIVITIES,
    "relation": RELATIONS,
    "noun": ANIMALS,
    "object": OBJECTS,
    "colour": COLOURS,
    "number": NUMBERS[1:],  # "one" would change the noun, too
}
"""What may stand for what: a word is changed for another of its class."""

CHANGED = """Here is a prompt for a model that draws pictures: {prompt}
Replace one word of it by another, so that it describes a clearly different picture of the same kind. Give {number}
versions, each with one word replaced. Write one per line, without numbers, quotation marks or remarks."""

SINGULAR = {plural(noun): noun for noun in ANIMALS + OBJECTS}


def by_lists(prompt: Prompt, count: int, chance: random.Random) -> list[dict[str, Any]]:
    """Up to `count` prompts with one word or phrase of `prompt` changed, as `{"prompt": text, ...}`.

    What the metadata says of the word that was changed (its noun, count or activity) is changed with it.
    """
    found = list(_changes(prompt))
    chance.shuffle(found)
    return found[:count]


def _changes(prompt: Prompt) -> Iterator[dict[str, Any]]:
    for kind, members in CLASSES.items():
        for word in members:
            for form in (word, plural(word)) if kind in ("noun", "object") else (word,):
                if not re.search(rf"\b{re.escape(form)}\b", prompt.text) or _inside_another(form, prompt.text, kind):
                    continue
                for other in members:
                    if other != word and not re.search(rf"\b{re.escape(other)}\b", prompt.text):
                        changed = plural(other) if form != word else other
                        text = _replaced(prompt.text, form, changed)
                        yield {"prompt": text, **_metadata(prompt.metadata, kind, word, other)}


def _inside_another(form: str, text: str, kind: str) -> bool:
    """Whether a word stands in the text only as part of an activity: the book of "reading a book"."""
    if kind in ("activity", "relation"):
        return False
    for activity in (*CLASSES["activity"], *CLASSES["relation"]):
        text = text.replace(activity, " ")
    return not re.search(rf"\b{re.escape(form)}\b", text)


def _replaced(text: str, old: str, new: str) -> str:
    """The text with a word replaced, and the article before it put right."""

    def written(match: re.Match[str]) -> str:
        before = match.group(1)
        if before is None:
            return new
        fitting = article(new)
        return f"{fitting.capitalize() if before[0].isupper() else fitting} {new}"

    return re.sub(rf"\b(?:(an?|An?) )?{re.escape(old)}\b", written, text, count=1)


def _metadata(known: Mapping[str, Any], kind: str, word: str, other: str) -> dict[str, Any]:
    """The metadata of a changed prompt, as far as it can be told."""
    kept = {key: value for key, value in known.items() if key in ("noun", "count", "activity")}
    if kind == "number" and "count" in kept:
        kept["count"] = NUMBERS.index(other) + 1
    key = "noun" if kind == "object" else kind
    if kept.get(key) == word:
        kept[key] = other
    return kept


def by_writer(writer: Writer, prompt: Prompt, count: int) -> list[dict[str, Any]]:
    """Up to `count` prompts that a language model made of `prompt` by changing one word; others of its are dropped."""
    answer = writer.ask(None, [CHANGED.format(prompt=prompt.text, number=count)])[0]
    if isinstance(answer, Failure):
        return []
    kept = [text for text in dict.fromkeys(lines(answer)) if one_word_changed(prompt.text, text)]
    return [{"prompt": text} for text in kept[:count]]


def one_word_changed(first: str, second: str) -> bool:
    """Whether two prompts differ in one word exactly; articles do not count, and a plural is no change."""
    one, other = normalised(first), normalised(second)
    return edit_distance(one, other) == 1 and len(one) == len(other) and not _plural_only(one, other)


def _plural_only(one: Sequence[str], other: Sequence[str]) -> bool:
    first, second = next((a, b) for a, b in zip(one, other, strict=True) if a != b)
    return plural(first) == second or plural(second) == first


def contrasted(prompts: Sequence[Prompt], count: int, seed: int = 0, writer: Writer | None = None) -> list[Prompt]:
    """The prompts for which there are changed ones, each with up to `count` of them as `contrast` in its metadata."""
    chance = random.Random(seed)
    found = []
    for prompt in prompts:
        changed = by_lists(prompt, count, chance) if writer is None else by_writer(writer, prompt, count)
        if changed:
            found.append(Prompt(prompt.text, {**prompt.metadata, "contrast": changed}))
    return found
