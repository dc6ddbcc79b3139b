"""Who reads attributes off pictures for an audit: CLIP, without training, or a vision-language model that is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tiller.rewards.judge.local import LocalViewer
from tiller.rewards.judge.viewer import Failure, Viewer, checked
from tiller.rewards.scorers.clip import Clip
from tiller.types import ConfigError

Options = Mapping[str, Mapping[str, str]]
"""{attribute: {option: what CLIP compares a picture with, or "" where a viewer is asked}}."""


def checked_options(options: Options) -> Options:
    """At least one attribute, each with at least two options.

    Raises:
        ConfigError: there are fewer.
    """
    short = [attribute for attribute, named in options.items() if len(named) < 2]
    if short or not options:
        thing = f"{short[0]!r} has fewer than two options" if short else "there are no attributes"
        raise ConfigError(f"{thing}; write `attribute: {{option: a photo of ..., option: ...}}`.")
    return options


@dataclass(frozen=True)
class ZeroShot:
    """The option whose text CLIP finds nearest to the picture (Radford et al. 2021, section 3.1)."""

    options: Options
    clip: Clip

    def __call__(self, images: Sequence[Any], prompts: Sequence[str]) -> dict[str, list[str | None]]:
        """{attribute: N options}; an option whose name the prompt holds makes that attribute None."""
        seen = self.clip.pictures(images) if len(images) else None
        found: dict[str, list[str | None]] = {}
        for attribute, texts in self.options.items():
            names = list(texts)
            nearest = [] if seen is None else (seen @ self.clip.texts(list(texts.values())).T).argmax(1).tolist()
            found[attribute] = [
                None if says(prompt, names) else names[index] for prompt, index in zip(prompts, nearest, strict=True)
            ]
        return found


@dataclass(frozen=True)
class Asked:
    """What a vision-language model answers; None where it names none of the options, or several."""

    options: Options
    viewer: Viewer
    question: str = "What is the {attribute} of what is shown? Answer with one of: {options}."

    def __call__(self, images: Sequence[Any], prompts: Sequence[str]) -> dict[str, list[str | None]]:
        """{attribute: N options}."""
        found: dict[str, list[str | None]] = {}
        for attribute, texts in self.options.items():
            names = list(texts)
            question = self.question.format(attribute=attribute, options=", ".join(names))
            answers = self.viewer.ask(images, [question] * len(images))
            found[attribute] = [
                None if says(prompt, names) else named(checked(answer), names)
                for prompt, answer in zip(prompts, answers, strict=True)
            ]
        return found


def says(prompt: str, names: Sequence[str]) -> bool:
    """Whether a prompt holds one of the options as a word, so that it is not open."""
    words = f" {' '.join(''.join(c if c.isalnum() else ' ' for c in prompt.lower()).split())} "
    return any(f" {name.lower()} " in words for name in names)


def named(answer: str | Failure, names: Sequence[str]) -> str | None:
    """The one option that an answer holds as a word; None for none, or several."""
    held = [] if isinstance(answer, Failure) else [name for name in names if says(answer, [name])]
    return held[0] if len(held) == 1 else None


@dataclass(frozen=True)
class ReaderSettings:
    """Who reads, as an audit's file says it."""

    name: str = "clip"  # clip, vlm, or emoji: the judge of the embedded world
    model: str = ""  # of clip and vlm: a folder, a name on the hub; "" is CLIP ViT-L/14
    revision: str | None = None
    device: str = "auto"
    batch_size: int = 32
    attributes: dict[str, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in ("clip", "vlm", "emoji"):
            raise ConfigError(f"reader.name is {self.name!r}; it must be clip, vlm or emoji.")
        if self.name == "vlm" and not self.model:
            raise ConfigError("reader.model is empty; name a vision-language model, such as emoji-llava.")

    def build(self) -> Any:
        """The reader, (images, prompts) -> {attribute: N options}."""
        if self.name == "emoji":
            from tiller.emoji.attributes import attributes

            return attributes
        options = checked_options(self.attributes)
        if self.name == "vlm":
            return Asked(
                options, LocalViewer(self.model, self.revision, batch_size=self.batch_size, device=self.device)
            )
        model = self.model or "openai/clip-vit-large-patch14"
        return ZeroShot(options, Clip("audit", model, self.revision, self.device, batch_size=self.batch_size))
