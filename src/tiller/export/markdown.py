"""Texts of others in a Markdown page: they are shown as they are, and do nothing."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~])")


def escape(text: str) -> str:
    """A text on one line, without HTML, links, pictures or any other mark-up."""
    flat = " ".join(text.split())
    return SPECIAL.sub(r"\\\1", html.escape(flat, quote=False))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are escaped already; the first column to the left, numbers to the right."""
    if not rows:
        return ""
    rule = ["---", *("---:" for _ in columns[1:])]
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows)]
    return "\n".join(lines) + "\n"
