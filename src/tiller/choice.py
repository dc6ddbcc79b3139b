"""A setting that is one of several classes, each with its own settings: `ddpo`, `{name: ddpo, clip_range: 1e-4}`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tiller.types import ConfigError


@dataclass(frozen=True)
class Word:
    """A word that a recipe may write in the place of a value, in the field's type: `Annotated[int, Word(..)]`."""

    text: str
    value: Any


@dataclass(frozen=True)
class Chosen:
    """One class of a `Choice`, by name, with the settings given for it; `load` imports it."""

    name: str
    target: str  # "package.module:Class"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> type:
        """The class itself."""
        module, _, name = self.target.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"config error: {self.target} cannot be loaded: {error}.") from error


@dataclass(frozen=True, eq=False)  # hashed by identity, as typing wants of what stands in an annotation
class Choice:
    """What a field may name, and the classes meant; it goes into the field's type, `Annotated[Chosen, Choice(..)]`.

    A name of the form `package.module:Class` chooses that class, so that one's own need not be listed.
    """

    options: Mapping[str, str]  # name -> "package.module:Class"

    def pick(self, name: str, **settings: Any) -> Chosen:
        """The option of that name; `KeyError` if there is none."""
        return Chosen(name, name if ":" in name else self.options[name], settings)
