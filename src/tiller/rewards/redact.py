"""Texts of others without the secrets of the environment: what a reward says is written to files."""

from __future__ import annotations

import os
import re

SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)
SHORTEST = 8  # characters; a shorter value is no secret, but might be part of any word


def redacted(text: str) -> str:
    """The text with the value of every environment variable that is named like a secret replaced by its name."""
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and SECRET.search(name):
            text = text.replace(value, f"[{name}]")
    return text
