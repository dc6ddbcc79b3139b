"""From the name of a reward to the object: a built-in, `package.module:name`, or `path/file.py:name`; where the name is
that of a class, to an instance with the recipe's settings."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from tiller.config import settings_of
from tiller.config_types import Unknown, parse_dataclass, suggest
from tiller.reward_spec import OWN
from tiller.rewards.call import Reward, flag
from tiller.types import ConfigError

BUILT_IN: dict[str, str] = {
    "jpeg_compressibility": "tiller.rewards.jpeg:jpeg_compressibility",
    "jpeg_incompressibility": "tiller.rewards.jpeg:jpeg_incompressibility",
    "emoji_gold": "tiller.emoji.judge:gold_accuracy",
    "emoji_alignment": "tiller.emoji.judge:alignment",
    "clip_score": "tiller.rewards.scorers.clip_score:ClipScore",
    "pick_score": "tiller.rewards.scorers.pick_score:PickScore",
    "aesthetic": "tiller.rewards.scorers.aesthetic:Aesthetic",
    "hps": "tiller.rewards.scorers.hps:HPS",
    "hps_v3": "tiller.rewards.scorers.hps_v3:HPSv3",
    "image_reward": "tiller.rewards.scorers.image_reward:ImageReward",
    "vqa_score": "tiller.rewards.scorers.vqa_score:VQAScore",
    "ocr": "tiller.rewards.scorers.ocr:OCR",
    "geneval": "tiller.rewards.scorers.geneval:GenEval",
    "vlm_alignment": "tiller.rewards.judge.describe:VLMAlignment",
    "vlm_counting": "tiller.rewards.judge.questions:VLMCounting",
    "vlm_questions": "tiller.rewards.judge.questions:VLMQuestions",
    "learned": "tiller.rewards.learned.reward:Learned",
    "contrast": "tiller.rewards.contrast:Contrast",
    "consistent": "tiller.rewards.consistency:Consistent",
    "people": "tiller.vote.people:People",
    "remote": "tiller.rewards.serving.client:Remote",
    "in_venv": "tiller.rewards.serving.venv:InVenv",
}
"""Name -> where the function or class is; it is imported when it is asked for."""


def resolve(spec: str, settings: Mapping[str, Any] | None = None, key: str = "reward") -> Reward:
    """The reward that `spec` names. A path is taken from the working directory.

    A class, which must be a dataclass, is called with `settings`; `key` is where in the recipe these stand.

    Raises:
        ConfigError: there is no such function or class, it does not know a setting, or does not take
            (images, prompts, metadata).
    """
    name, long = _spelt_out(spec, settings or {})
    return _checked(_made(find(name), name, long, key), spec)


def _spelt_out(spec: str, settings: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """An address is short for a remote reward, and a reward with a `python` of its own for one in that environment."""
    if spec.startswith(("http://", "https://")):
        return "remote", {"url": spec, **settings}
    if "python" in settings and spec != "in_venv":
        return "in_venv", {"reward": spec, **settings}
    return spec, settings


def complete(setting: Any, key: str = "reward") -> Any:
    """A recipe's reward setting with the defaults of every scorer's class written out, as plain data.

    Raises:
        ConfigError: there is no such reward, or it does not know a setting.
    """
    if isinstance(setting, (list, tuple)):
        return [complete(entry, f"{key}[{index}]") for index, entry in enumerate(setting)]
    given = dict(setting) if isinstance(setting, Mapping) else {"name": setting}
    if setting is None:
        return None
    name, settings = _spelt_out(given["name"], {own: value for own, value in given.items() if own not in OWN})
    found = find(name)
    if not (inspect.isclass(found) and is_dataclass(found)):
        return setting
    defaults = settings_of(_made(found, name, settings, key))
    return {**given, **defaults} if defaults or len(given) > 1 else setting


def find(spec: str) -> Any:
    """The function, class or instance that `spec` names, as it is.

    Raises:
        ConfigError: there is none.
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
    return getattr(module, name)


def _made(found: Any, spec: str, settings: Mapping[str, Any], key: str) -> Any:
    """An instance of a class, with its settings; whatever else was found has none."""
    if inspect.isclass(found) and is_dataclass(found):
        try:
            return parse_dataclass(found, settings, key)
        except Unknown as error:
            raise ConfigError(_unknown(error.key.removeprefix(f"{key}."), spec, error.siblings, key)) from None
    if settings:
        raise ConfigError(_unknown(next(iter(settings)), spec, (), key))
    return found


def _unknown(name: str, spec: str, settings: Sequence[str], key: str) -> str:
    """`config error: reward.modle is unknown; did you mean reward.model?`"""
    if close := suggest(name, [*settings, *OWN]):
        return f"config error: {key}.{name} is unknown; did you mean {key}.{close}?"
    taken = f"{spec} takes {', '.join(settings)}" if settings else f"{spec} takes no settings"
    return f"config error: {key}.{name} is unknown; {taken}, beside {', '.join(OWN)}."


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
            "name a function, a dataclass whose instances can be called, or such an instance."
        )
    try:
        signature = inspect.signature(reward)
    except ValueError:  # some functions written in C do not tell
        return reward
    pairwise = flag(reward, "pairwise")
    try:
        signature.bind(*[[]] * (4 if pairwise else 3))
    except TypeError as error:
        wanted = "a pairwise reward takes (first, second," if pairwise else "a reward takes (images,"
        raise ConfigError(f"the reward {spec!r} takes {signature}; {wanted} prompts, metadata).") from error
    return reward
