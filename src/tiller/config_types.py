"""One value of a recipe against one type annotation. Nothing is guessed: what does not fit is an error with
its key."""

from __future__ import annotations

import copy
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from tiller.choice import Choice, Chosen, Word
from tiller.types import ConfigError

_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
    Any: "anything",
}


class Unknown(Exception):
    """A key that is no field; the message needs the whole schema, so it is made further up."""

    def __init__(self, key: str, siblings: Sequence[str]) -> None:
        super().__init__(key)
        self.key, self.siblings = key, siblings


def parse_dataclass(cls: type, mapping: Any, key: str) -> Any:
    """An instance of `cls` whose fields come from a mapping; `key` is where in the recipe that stands."""
    known: dict[str, Any] = {entry.name: entry for entry in fields(cls) if entry.init}
    if not isinstance(mapping, Mapping):
        raise _wrong(key, mapping, f"a mapping with {', '.join(known) or 'nothing in it'}")
    hints = get_type_hints(cls, include_extras=True)
    values = {}
    for name, value in mapping.items():
        here = join(key, str(name))
        if name not in known:
            raise Unknown(here, tuple(known))
        values[name] = parse_value(value, hints[name], here)
    for name, entry in known.items():
        if name not in values and entry.default is MISSING and entry.default_factory is MISSING:
            raise ConfigError(f"config error: {join(key, name)} is missing; it must be {_words(hints[name])}.")
    try:
        return cls(**values)
    except (ConfigError, ValueError) as error:
        if str(error).startswith("config error:"):
            raise  # it knows its place better
        raise ConfigError(f"config error: {key}: {error}" if key else f"config error: {error}") from error


def parse_value(value: Any, hint: Any, key: str) -> Any:
    """The value as the type that `hint` asks for."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        choice = next((mark for mark in arguments[1:] if isinstance(mark, Choice)), None)
        if choice is None:
            words = {mark.text: mark.value for mark in arguments[1:] if isinstance(mark, Word)}
            known = isinstance(value, str) and value in words
            return words[value] if known else parse_value(value, arguments[0], key)
        if value is None and type(None) in get_args(arguments[0]):
            return None
        return _choice(value, choice, key)
    if origin in (Union, types.UnionType):
        return _union(value, hint, key)
    if origin is Literal:
        return _literal(value, arguments, key)
    if origin is tuple:
        return _tuple(value, arguments, hint, key)
    if hint is dict or origin is dict:
        return _free_form(value, key)
    if isinstance(hint, type) and is_dataclass(hint):
        return parse_dataclass(hint, value, key)
    return _scalar(value, hint, key)


def _scalar(value: Any, hint: Any, key: str) -> Any:
    if hint is Any:
        return copy.deepcopy(value)
    if hint not in _WORDS:
        raise ConfigError(f"config error: {key} cannot be set in a recipe; leave it out (it can be set in Python).")
    if hint is float and type(value) in (int, float) and not math.isnan(value):
        return float(value)
    if hint is not float and type(value) is hint:
        return value
    raise _wrong(key, value, _words(hint))


def _union(value: Any, hint: Any, key: str) -> Any:
    """The first type of the union that fits; of several numbers, the one that the value already is."""
    if value is None and type(None) in get_args(hint):
        return None
    arms = [arm for arm in get_args(hint) if arm is not type(None)]
    if len(arms) == 1 and arms[0] not in _WORDS:
        return parse_value(value, arms[0], key)  # for the message of what is inside
    for arm in sorted(arms, key=lambda arm: arm is not type(value)):
        if fits(value, arm):
            return parse_value(value, arm, key)
    raise _wrong(key, value, _words(hint))


def fits(value: Any, hint: Any) -> bool:
    """Whether `parse_value` takes the value."""
    try:
        parse_value(value, hint, "")
    except (ConfigError, Unknown):
        return False
    return True


def _literal(value: Any, options: tuple[Any, ...], key: str) -> Any:
    if any(value == option and type(value) is type(option) for option in options):
        return value
    close = suggest(str(value), [str(option) for option in options])
    raise _wrong(key, value, _one_of(options), close)


def _tuple(value: Any, arguments: tuple[Any, ...], hint: Any, key: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise _wrong(key, value, f"{_words(hint)}, such as [a, b]")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        raise _wrong(key, value, _words(hint))
    return tuple(
        parse_value(entry, argument, f"{key}[{index}]")
        for index, (entry, argument) in enumerate(zip(value, arguments, strict=True))
    )


def _free_form(value: Any, key: str) -> dict[str, Any]:
    """A mapping that is passed on as it is, such as a pipeline's own call arguments."""
    if not isinstance(value, Mapping):
        raise _wrong(key, value, "a mapping of settings")
    if odd := [name for name in value if not isinstance(name, str)]:
        raise ConfigError(f"config error: {join(key, str(odd[0]))} has a name that is no text; quote it.")
    return copy.deepcopy(dict(value))


def _choice(value: Any, choice: Choice, key: str) -> Chosen:
    settings = dict(value) if isinstance(value, Mapping) else {"name": value}
    if "name" not in settings:
        raise ConfigError(f"config error: {key}.name is missing; it must be one of {', '.join(choice.options)}.")
    name = settings.pop("name")
    if not isinstance(name, str) or (name not in choice.options and ":" not in name):
        close = suggest(str(name), choice.options)
        names = ", ".join(choice.options)
        raise _wrong(key, name, f"one of {names}, or your own package.module:Class", close)
    return choice.pick(name, **_free_form(settings, key))


def _wrong(key: str, value: Any, expected: str, close: str | None = None) -> ConfigError:
    hint = f"; did you mean {close}?" if close else "."
    return ConfigError(f"config error: {key or 'the recipe'} is {value!r}; it must be {expected}{hint}")


def _words(hint: Any) -> str:
    """A type in words, for a message."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _words(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(_words(arm) for arm in arguments)
    if origin is Literal:
        return _one_of(arguments)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return f"a list of {_words(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}: " + ", ".join(map(_words, arguments))
    return _WORDS.get(hint, "a mapping of settings")


def _one_of(options: tuple[Any, ...]) -> str:
    return "one of " + ", ".join(map(str, options))


def dataclass_in(hint: Any) -> type | None:
    """The dataclass that a type holds, through unions; None for scalars, lists and choices."""
    for arm in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
        if isinstance(arm, type) and is_dataclass(arm):
            return arm
    return None


def join(key: str, name: str) -> str:
    """`train` and `epochs` make `train.epochs`."""
    return f"{key}.{name}" if key else name


def suggest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str | None:
    """The known name closest to a mistyped one, if any is close; `lr` is as good as `learning_rate`."""
    words = {"".join(word[:1] for word in key.split("_")): key for key in known if "_" in key}
    words |= {key: key for key in known}
    close = get_close_matches(name, words, n=1)
    return words[close[0]] if close else None
