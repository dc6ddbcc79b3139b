"""The base model's licence, where something on this machine says it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiller import emoji, yaml_text
from tiller.types import ConfigError

UNKNOWN = "unknown"
OWN = "apache-2.0"  # of the embedded models, as of the package


def licence_of(name: str, revision: str | None = None) -> tuple[str, str]:
    """(the licence's name, who says so); (`unknown`, "") where nobody does. Never asks the network."""
    if name in emoji.MODELS:
        return OWN, "the package that it comes with"
    card = _card(name, revision)
    front = _front_matter(card) if card else {}
    said = front.get("license_name") or front.get("license")
    return (said, "its model card") if isinstance(said, str) and said else (UNKNOWN, "")


def _card(name: str, revision: str | None) -> Path | None:
    local = Path(name) / "README.md"
    if local.exists():
        return local
    if name.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "README.md", revision=revision)
    return Path(found) if isinstance(found, str) else None


def _front_matter(card: Path) -> dict[str, Any]:
    text = card.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n"):
        return {}
    try:
        found = yaml_text.parse(text[4:].split("\n---", 1)[0], str(card))
    except ConfigError:
        return {}
    return found if isinstance(found, dict) else {}
