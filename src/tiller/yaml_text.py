"""YAML for recipes: safe, strict, and with the scalars of YAML 1.2.

PyYAML follows YAML 1.1, where `1e-4` is a text, `no` is false, `010` is eight and `1:30` is ninety. Here
`1e-4` is a number and `no` is a text, as a reader expects. A key given twice is an error instead of the
last one winning.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, ClassVar

import yaml

from tiller.types import ConfigError

_FLOAT = re.compile(
    r"^[-+]?(?:(?:[0-9][0-9_]*)(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)|[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
)
_SCALARS: tuple[tuple[str, re.Pattern[str], str], ...] = (
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), "~nN\0"),
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"), "-+0123456789"),
    ("tag:yaml.org,2002:float", _FLOAT, "-+.0123456789"),
    ("tag:yaml.org,2002:merge", re.compile(r"^<<$"), "<"),
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars above and without repeated keys."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is given twice; keep one", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes a text which the loader above would take for a number."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        key: list(rules) for key, rules in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _firsts in _SCALARS:
    _Loader.add_implicit_resolver(_tag, _pattern, ["" if first == "\0" else first for first in _firsts])
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse(text: str, where: str) -> Any:
    """The value of a YAML text; `where` (a file, an override) begins the message if it is not YAML."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}" if mark else where
        raise ConfigError(f"config error: {place}: {getattr(error, 'problem', None) or error}.") from error


def read(path: str | Path) -> Any:
    """The value in a YAML file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(
            f"config error: there is no recipe {path}; a path starts at the working directory."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config error: the recipe {path} cannot be read as text: {error}.") from error
    return parse(text, str(path))


def write(value: Any) -> str:
    """YAML text of plain mappings, lists and scalars, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
