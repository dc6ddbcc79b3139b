"""What a recipe says of its rewards: one name, or several, with weights and settings. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tiller.config_types import parse_dataclass
from tiller.types import ConfigError

RewardSetting = str | dict[str, Any] | tuple[str | dict[str, Any], ...]
"""A name, `{name: clip_score, weight: 0.5, model: some/path}`, or a list of these."""

TOTAL = "total"  # what the weighted sum of several rewards is called beside its parts


@dataclass(frozen=True)
class Scale:
    """What a raw score is measured in: (score - mean) / std."""

    mean: float
    std: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise ConfigError(f"a scale of mean {self.mean} and std {self.std} cannot be; the std must be above 0.")


@dataclass(frozen=True)
class RewardSpec:
    """One reward of a recipe."""

    name: str  # a built-in, package.module:name, or path/file.py:name
    weight: float = 1.0  # in the sum; 0 only logs it
    normalise: bool | Scale = False  # true: by mean and std of the trial's pictures, measured once
    max_missing: float | None = None  # the share of an epoch's scores that may be missing; None: run.max_missing
    settings: dict[str, Any] = field(default_factory=dict)  # of the scorer's class
    label: str = ""  # what its scores are called in the log
    key: str = "reward"  # where in the recipe it stands

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("name is empty; name a reward.")
        if not math.isfinite(self.weight):
            raise ConfigError(f"weight is {self.weight}; it must be finite.")
        check_share(self.max_missing)


OWN = ("name", "weight", "normalise", "max_missing")  # the keys that are not the scorer's


def check_share(share: float | None) -> None:
    """Refuse what is no share.

    Raises:
        ConfigError: it is not between 0 and 1.
    """
    if share is not None and not 0 <= share <= 1:
        raise ConfigError(f"max_missing is {share}; it must be a share from 0 to 1.")


def read(setting: RewardSetting | None, key: str = "reward") -> tuple[RewardSpec, ...]:
    """The rewards that a setting names, each with a label of its own; `key` is where in the recipe it stands.

    Raises:
        ConfigError: it is malformed, or no reward in it counts.
    """
    if setting is None:
        return ()
    if isinstance(setting, Sequence) and not isinstance(setting, str):
        specs = [_one(entry, f"{key}[{index}]") for index, entry in enumerate(setting)]
        if not specs:
            raise ConfigError(f"config error: {key} is an empty list; name at least one reward.")
    else:
        specs = [_one(setting, key)]
    if not any(spec.weight for spec in specs):
        raise ConfigError(f"config error: all weights in {key} are 0, so nothing is rewarded; give one that is not.")
    return _labelled(specs, [spec.name if len(specs) == 1 else spec.name.rpartition(":")[2] for spec in specs])


def read_reported(setting: RewardSetting, key: str = "evaluation.rewards") -> tuple[RewardSpec, ...]:
    """The rewards of a setting that are reported one by one, so that they have neither weight nor scale.

    Raises:
        ConfigError: it is malformed, or gives one of them a weight or a scale.
    """
    if isinstance(setting, Sequence) and not setting:
        return ()
    specs = read(setting, key)
    for spec in specs:
        if spec.weight != 1.0 or spec.normalise is not False:
            raise ConfigError(
                f"config error: {spec.key} has a weight or a scale, and evaluation reports raw scores one by one; "
                "leave out weight and normalise."
            )
    return _labelled(specs, [spec.name for spec in specs])


def title(setting: RewardSetting | None) -> str:
    """What a setting rewards, in words: `clip_score + 0.1 jpeg_compressibility`. What is only logged is left out."""
    specs = [spec for spec in read(setting) if spec.weight]
    if len(specs) == 1:
        return specs[0].label
    return " + ".join(spec.label if spec.weight == 1 else f"{spec.weight:g} {spec.label}" for spec in specs)


def heading(setting: RewardSetting | None) -> str | None:
    """The key of the trained reward in tables and files: its label, or `total` for a sum of several."""
    specs = read(setting)
    return None if not specs else specs[0].label if len(specs) == 1 else TOTAL


def _one(value: Any, key: str) -> RewardSpec:
    given = dict(value) if isinstance(value, Mapping) else {"name": value}
    settings = {name: entry for name, entry in given.items() if name not in OWN}
    own = {name: entry for name, entry in given.items() if name in OWN}
    if "name" not in own:
        raise ConfigError(f"config error: {key}.name is missing; name a reward.")
    spec: RewardSpec = parse_dataclass(RewardSpec, own, key)
    return replace(spec, settings=settings, key=key)


def _labelled(specs: Sequence[RewardSpec], names: Sequence[str]) -> tuple[RewardSpec, ...]:
    """Each spec with its name as its label; the second of a name is `name#2`."""
    labelled: list[RewardSpec] = []
    for index, (spec, name) in enumerate(zip(specs, names, strict=True)):
        count = names[:index].count(name)
        labelled.append(replace(spec, label=name if not count else f"{name}#{count + 1}"))
    return tuple(labelled)
