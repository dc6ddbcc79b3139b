"""From the name of a reward to the function: a built-in, `package.module:name`, or `path/file.py:name`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType

from tiller.rewards.contract import Reward
from tiller.types import ConfigError

BUILT_IN: dict[str, str] = {
    "jpeg_compressibility": "tiller.rewards.jpeg:jpeg_compressibility",
    "jpeg_incompressibility": "tiller.rewards.jpeg:jpeg_incompressibility",
    "emoji_gold": "tiller.emoji.judge:gold_accuracy",
    "emoji_alignment": "tiller.emoji.judge:alignment",
}
"""Name -> where the function is; it is imported when it is asked for."""


def resolve(spec: str) -> Reward:
    """The reward function that `spec` names. A path is taken from the working directory.

    Raises `ConfigError` if there is no such function or it does not take (images, prompts, metadata).
    """
    place, colon, name = BUILT_IN.get(spec, spec).rpartition(":")
    if not (colon and place and name):
        raise ConfigError(f"the reward {spec!r} is unknown; {_suggestion(spec)}")
    module = _from_file(Path(place), spec) if place.endswith(".py") else _from_package(place, spec)
    if not hasattr(module, name):
        functions = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        close = get_close_matches(name, functions, n=1)
        hint = f"did you mean {place}:{close[0]}?" if close else f"it has {', '.join(functions) or 'none'}."
        raise ConfigError(f"the reward {spec!r} is unknown: {place} has no {name!r}; {hint}")
    return _checked(getattr(module, name), spec)


def _suggestion(spec: str) -> str:
    if close := get_close_matches(spec, BUILT_IN, n=1):
        return f"did you mean {close[0]}?"
    return f"name one of {', '.join(BUILT_IN)}, or your own function as package.module:name or path/file.py:name."


def _from_package(place: str, spec: str) -> ModuleType:
    """A module on the import path; its own failing imports are told apart from its absence."""
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name and (place == error.name or place.startswith(error.name + ".")):
            raise ConfigError(
                f"the reward {spec!r} is unknown: there is no module {error.name!r} to import; install it, "
                "or name the file as path/file.py:name."
            ) from error
        raise ConfigError(
            f"the reward {spec!r} cannot be loaded: it needs the module {error.name!r}; install it."
        ) from error
    except Exception as error:
        raise ConfigError(f"the reward {spec!r} cannot be loaded: {type(error).__name__}: {error}") from error


def _from_file(path: Path, spec: str) -> ModuleType:
    """A Python file as a module, under a name of its own, so that two files of one name do not meet."""
    if not path.is_file():
        raise ConfigError(
            f"the reward {spec!r} is unknown: there is no file {path}; a path starts at the working directory."
        )
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    loader = importlib.util.spec_from_file_location(f"tiller_reward_{path.stem}_{digest}", path)
    assert loader is not None  # a .py file always has one
    assert loader.loader is not None
    module = importlib.util.module_from_spec(loader)
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    try:
        loader.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module.__name__]
        raise ConfigError(f"the reward {spec!r} cannot be loaded: {type(error).__name__}: {error}") from error
    return module


def _checked(reward: object, spec: str) -> Reward:
    """The reward, if it can be called with images, prompts and metadata."""
    if inspect.isclass(reward) or not callable(reward):
        raise ConfigError(
            f"the reward {spec!r} is not a function but a "
            f"{'class' if inspect.isclass(reward) else type(reward).__name__}; "
            "name a function, or an instance that can be called."
        )
    try:
        signature = inspect.signature(reward)
    except ValueError:  # some functions written in C do not tell
        return reward
    try:
        signature.bind([], [], [])
    except TypeError as error:
        raise ConfigError(
            f"the reward {spec!r} takes {signature}; a reward takes (images, prompts, metadata)."
        ) from error
    return reward
