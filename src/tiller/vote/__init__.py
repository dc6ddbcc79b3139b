"""Preferences of people: a page on which two pictures of a prompt are compared, and what its votes are good for."""

from __future__ import annotations


def asks_people(reward: object) -> bool:
    """Whether a reward, or one that it is the sum of, waits for people."""
    parts = getattr(reward, "parts", ())
    return bool(getattr(reward, "human", False)) or any(asks_people(getattr(part, "reward", None)) for part in parts)
