"""Words in answers and prompts: which of them carry meaning, numbers in both spellings, and who is written alike."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from difflib import SequenceMatcher

from tiller.emoji.words import plural

_NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty"""
NUMBERS: tuple[str, ...] = tuple(_NUMBERS.split())
"""Index -> how a number is written out."""

_EMPTY = """a an and are as at be by for from has have in into is it its no of on or that the their there this to with
    image picture photo"""
EMPTY_WORDS = frozenset(_EMPTY.split())
"""Words that say nothing of what a picture shows."""


def words(text: str) -> list[str]:
    """The words of a text in lower case, numerals up to 20 written out; signs and accents are dropped."""
    plain = "".join(
        letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter)
    ).lower()
    found = re.findall(r"[^\W_]+", plain)
    return [NUMBERS[int(word)] if word.isdecimal() and int(word) < len(NUMBERS) else word for word in found]


def content_words(prompt: str) -> list[str]:
    """The words of a prompt that could be seen in a picture, without those it asks to be written ("in quotes")."""
    unquoted = re.sub(r'"[^"]*"|“[^”]*”|«[^»]*»', " ", prompt)
    return list(dict.fromkeys(word for word in words(unquoted) if word not in EMPTY_WORDS))


def says(answer: str, wanted: str) -> bool:
    """Whether whole words of the answer, one after the other, are those wanted, or the last of them in the plural.

    "4" is "four", and "cats" says "cat"; "none" does not say "one", nor "caterpillar" "cat".
    """
    given, expected = words(answer), words(wanted)
    if not expected:
        return False
    forms = [expected, [*expected[:-1], plural(expected[-1])]]
    length = len(expected)
    return any(given[start : start + length] in forms for start in range(len(given) - length + 1))


def contains(answer: str, wanted: str) -> bool:
    """Whether the answer holds the text wanted, be it inside of a word; a number may be written either way.

    The rule of the DDPO authors' code, where "none" contains "one".
    """
    lowered, plain = answer.lower(), wanted.lower().strip()
    spellings = {plain}
    if plain in NUMBERS:
        spellings.add(str(NUMBERS.index(plain)))
    elif plain.isdecimal() and int(plain) < len(NUMBERS):
        spellings.add(NUMBERS[int(plain)])
    return bool(plain) and any(spelling in lowered for spelling in spellings)


def yes_or_no(answer: str) -> bool | None:
    """The first "yes" or "no" of an answer; None if there is neither."""
    return next((word == "yes" for word in words(answer) if word in ("yes", "no")), None)


def share_written(wanted: Iterable[str], text: str, alike: float) -> float:
    """The share of the words wanted that a text holds, also misspelt: "sixx tutttles" holds "six" and "turtles".

    Args:
        alike: how similar two words must be, by `difflib.SequenceMatcher.ratio` in [0, 1].
    """
    there, sought = set(words(text)), list(wanted)
    found = [any(SequenceMatcher(None, word, other).ratio() >= alike for other in there) for word in sought]
    return sum(found) / len(found) if found else 0.0
