"""Nested frozen dataclasses <-> YAML <-> `key.sub=value`: typed, strict, without torch.

The dataclasses are the schema. Their types may be int, float, bool, str, None, Any, Literal, unions of
these, tuples, `dict[str, Any]`, other dataclasses, and `Annotated[Chosen, Choice(...)]` for one of several
classes. A key that is no field is an error; nothing is converted but a whole number to a float, and a list
to a tuple.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from tiller import yaml_text
from tiller.choice import Chosen
from tiller.config_types import Unknown, dataclass_in, fits, join, parse_dataclass, suggest
from tiller.types import ConfigError

T = TypeVar("T")


def load(cls: type[T], path: str | Path | None, overrides: Sequence[str] = (), *, check: bool = True) -> T:
    """An instance of `cls` from a YAML file (or from its defaults, without one) and `key.sub=value` overrides.

    Without `check`, settings of a chosen class are taken as they are, and the class is not imported.
    """
    mapping = {} if path is None else yaml_text.read(path)
    if mapping is None:
        mapping = {}
    if not isinstance(mapping, dict):
        raise ConfigError(f"config error: {path} holds a {type(mapping).__name__}; write `key: value` lines.")
    for override in overrides:
        _override(cls, mapping, override)
    return from_mapping(cls, mapping, check=check)


def from_mapping(cls: type[T], mapping: Mapping[str, Any], *, check: bool = True) -> T:
    """An instance of `cls` from plain mappings, lists and scalars.

    Raises `ConfigError` that names the key: unknown, missing, of the wrong type, or refused by the dataclass.
    """
    try:
        instance = parse_dataclass(cls, mapping, "")
        for key, chosen in _choices(instance, ""):
            if check and chosen.settings:  # needs the class, hence perhaps torch: so it comes last
                parse_dataclass(chosen.load(), chosen.settings, key)
    except Unknown as error:
        raise ConfigError(f"config error: {_unknown(cls, error)}") from None
    return instance


def build(chosen: Chosen) -> Any:
    """The object of a chosen class, made from its settings."""
    return from_mapping(chosen.load(), chosen.settings)


def to_mapping(instance: Any, complete: bool = False) -> dict[str, Any]:
    """Plain mappings, lists and scalars from which `from_mapping` makes an equal instance.

    `complete` adds the default settings of every chosen class (and imports it), so that the record of a run
    does not change its meaning when a default does.
    """
    return {entry.name: _plain(getattr(instance, entry.name), complete) for entry in fields(instance)}


def to_yaml(instance: Any, complete: bool = False) -> str:
    """`to_mapping` as YAML text."""
    return yaml_text.write(to_mapping(instance, complete))


def _plain(value: Any, complete: bool) -> Any:
    if isinstance(value, Chosen):
        settings = dict(value.settings)
        if complete:
            settings = settings_of(build(value)) | settings
        return {"name": value.name, **settings} if settings else value.name
    if is_dataclass(value) and not isinstance(value, type):
        return to_mapping(value, complete)
    if isinstance(value, Mapping):
        return {key: _plain(entry, complete) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry, complete) for entry in value]
    return value


def settings_of(instance: Any) -> dict[str, Any]:
    """What a recipe can say about a chosen class: those of its fields that can be read back."""
    hints = get_type_hints(type(instance), include_extras=True)
    values = {entry.name: _plain(getattr(instance, entry.name), False) for entry in fields(instance) if entry.init}
    return {name: value for name, value in values.items() if fits(value, hints[name])}


def _choices(instance: Any, key: str) -> Iterator[tuple[str, Chosen]]:
    """Every chosen class in a nest of dataclasses, with its key."""
    for entry in fields(instance):
        value = getattr(instance, entry.name)
        here = join(key, entry.name)
        if isinstance(value, Chosen):
            yield here, value
        elif is_dataclass(value) and not isinstance(value, type):
            yield from _choices(value, here)


def parse_pairs(pairs: Sequence[str]) -> dict[str, Any]:
    """`["guidance_scale=3", "height=64"]` as a mapping, for settings that have no schema; the values are YAML."""
    mapping: dict[str, Any] = {}
    for pair in pairs:
        key, value = _pair(pair)
        mapping[key] = value
    return mapping


def _pair(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise ConfigError(f"config error: {text!r} is no setting; write key=value or key.sub=value.")
    return key.strip(), yaml_text.parse(value, f"setting {key.strip()}")


def _override(cls: type, mapping: dict[str, Any], override: str) -> None:
    """Put one `key.sub=value` into the mapping; the value is YAML, so `null`, `[a, b]` and `1e-4` mean what
    they say."""
    key, value = _pair(override)
    parts = key.split(".")
    holder: Any = mapping
    for depth, part in enumerate(parts[:-1]):
        place = _place(holder, part)
        inner = holder[place] if isinstance(holder, list) else holder.get(place)
        if inner is None:
            inner = _default_choice(cls, parts[: depth + 1])
        elif isinstance(inner, str):
            inner = {"name": inner}  # `algorithm: ddpo` becomes {name: ddpo}, to take settings
        into_a_list = isinstance(inner, list) and depth + 2 < len(parts) and _place(inner, parts[depth + 1]) is not None
        if not isinstance(inner, dict) and not into_a_list:
            where = ".".join(parts[: depth + 1])
            raise ConfigError(f"config error: {where} is {inner!r}, so {key} cannot be set; it has no keys.")
        holder[place] = inner
        holder = inner
    holder[parts[-1]] = value


def _place(holder: Any, part: str) -> Any:
    """The key of a mapping, or the index in a list (`reward.1.weight`), if there is an entry of that number."""
    if not isinstance(holder, list):
        return part
    return int(part) if part.isdecimal() and int(part) < len(holder) else None


def _default_choice(cls: type, parts: Sequence[str]) -> dict[str, Any]:
    """The mapping that an override starts from where the recipe is silent: the default's name, if it is a
    choice."""
    for part in parts[:-1]:
        cls = dataclass_in(get_type_hints(cls, include_extras=True).get(part)) or cls
    entry = next((entry for entry in fields(cls) if entry.name == parts[-1]), None)
    if entry is not None and isinstance(entry.default, Chosen):
        return {"name": entry.default.name, **entry.default.settings}
    if entry is not None and isinstance(entry.default, str):
        return {"name": entry.default}
    return {}


def _unknown(cls: type, error: Unknown) -> str:
    """`train.lrr is unknown; did you mean train.lr?`, from its neighbours first, then from anywhere in the
    schema."""
    parent, _, name = error.key.rpartition(".")
    prefix = f"{parent}." if parent else ""
    if close := suggest(name, error.siblings):
        return f"{error.key} is unknown; did you mean {prefix}{close}?"
    everywhere: dict[str, str] = {}
    for key in _leaves(cls, ""):
        everywhere.setdefault(key.rpartition(".")[2], key)
    if close := suggest(name, everywhere):
        return f"{error.key} is unknown; did you mean {everywhere[close]}?"
    return f"{error.key} is unknown; {parent or 'the recipe'} takes {', '.join(error.siblings) or 'no settings'}."


def _leaves(cls: type, key: str) -> Iterator[str]:
    """The keys of a schema that hold no further keys."""
    hints = get_type_hints(cls, include_extras=True)
    for entry in fields(cls):
        here = join(key, entry.name)
        inner = dataclass_in(hints[entry.name])
        if inner is None:
            yield here
        else:
            yield from _leaves(inner, here)
