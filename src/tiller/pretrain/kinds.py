"""Which model `tiller pretrain` trains: the settings' key `model` says it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tiller import config, yaml_text
from tiller.config_types import suggest
from tiller.pretrain.config import PretrainConfig
from tiller.pretrain.reader_config import ClipConfig, LlavaConfig
from tiller.types import ConfigError

Settings = PretrainConfig | ClipConfig | LlavaConfig
KINDS: dict[str, type[PretrainConfig] | type[ClipConfig] | type[LlavaConfig]] = {
    "diffusion": PretrainConfig,
    "clip": ClipConfig,
    "llava": LlavaConfig,
}


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Settings:
    """The settings of a file and of `key=value` overrides, in the class that their `model` names (else diffusion).

    Raises:
        ConfigError: there is no such model, or a setting is none of its own.
    """
    mapping = {} if path is None else yaml_text.read(path)
    said = mapping.get("model", "diffusion") if isinstance(mapping, dict) else "diffusion"
    model = str(config.parse_pairs([pair for pair in overrides if pair.startswith("model=")]).get("model", said))
    if model not in KINDS:
        meant = suggest(model, KINDS)
        hint = f"did you mean {meant}?" if meant else f"give {', '.join(KINDS)}."
        raise ConfigError(f"config error: model is {model!r}, which cannot be trained from scratch; {hint}")
    return config.load(KINDS[model], path, overrides)
