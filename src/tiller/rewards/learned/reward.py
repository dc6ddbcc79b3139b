"""A learned reward: an ensemble of heads on a frozen CLIP, in a folder of safetensors and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from tiller.rewards.hub import folder_of
from tiller.rewards.learned.head import Head, HeadSettings
from tiller.rewards.scorers.clip import Clip
from tiller.run.files import replace_file, sha256
from tiller.types import ConfigError, Score

CONFIG, WEIGHTS = "config.json", "heads.safetensors"


@dataclass(frozen=True)
class About:
    """What a folder's config.json says."""

    clip: str  # the CLIP whose embeddings the heads read
    revision: str | None
    clip_sha256: str  # of its weights
    width: int  # of an embedding
    head: HeadSettings
    members: int
    temperature: (
        float  # T of p(first is better) = σ((h_1 - h_2)/T), h being the heads' mean; of labels, of σ(logit h/T)
    )
    kind: str  # preferences or labels
    heads_sha256: str = ""  # of their file; written with it


@dataclass(frozen=True)
class Learned:
    """The mean of an ensemble's scores, less `pessimism` times their standard deviation.

    After Coste et al. 2023 (2310.02743, section 3), who take off the variance; a deviation has the scores' unit.

    Fitted on preferences, scores are log-odds: a picture is preferred to one of the same prompt whose score is lower by
    d with probability σ(d), as far as the folder's calibration says. Fitted on labels, they are labels in [0, 1].
    """

    deterministic: ClassVar[bool] = True

    path: str = ""  # a folder that `tiller fit-reward` wrote
    pessimism: float = 0.0  # a picture on which the members disagree is worth less
    differentiable: bool = False  # take pictures as a tensor, return scores with their graph
    device: str = "auto"
    batch_size: int = 32

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("path is empty; give the folder that tiller fit-reward wrote.")
        if self.pessimism < 0:
            raise ConfigError(f"pessimism is {self.pessimism}; it must be 0 or more.")

    def __call__(
        self, images: Sequence[Any] | Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[Score] | Tensor:
        """N scores: of PIL pictures a list, with the members' spread as a note; of a tensor a tensor."""
        if isinstance(images, Tensor):
            return self._combined(self._members(images, prompts)).to(images.device)
        if not len(images):
            return []
        with torch.no_grad():
            scores = self._members(images, prompts)
        spread = scores.std(0, unbiased=False)
        return [
            Score(value, note=f"members differ by {one:.3g}")
            for value, one in zip(self._combined(scores).tolist(), spread.tolist(), strict=True)
        ]

    @property
    def identity(self) -> str:
        """What was fitted, so that scores kept from before another fit are not taken for this one's."""
        file = Path(self.path) / CONFIG
        return sha256(file) if file.is_file() else ""

    @cached_property
    def about(self) -> About:
        """What the folder says of itself.

        Raises:
            ConfigError: there is no such folder, or it is damaged.
        """
        file = Path(self.path) / CONFIG
        try:
            data = json.loads(file.read_text())
            head = HeadSettings(**data["head"] | {"hidden": tuple(data["head"]["hidden"])})
            return About(**{key: data[key] for key in About.__annotations__} | {"head": head})
        except FileNotFoundError as error:
            raise ConfigError(
                f"{self.path} holds no learned reward; give a folder that tiller fit-reward wrote."
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file} is damaged ({error}); fit the reward again.") from error

    @cached_property
    def clip(self) -> Clip:
        """The CLIP it was fitted on.

        Raises:
            ConfigError: its weights are others now.
        """
        about = self.about
        if clip_digest(about.clip, about.revision) != about.clip_sha256:
            raise ConfigError(f"{about.clip} is not the CLIP that {self.path} was fitted on; fit the reward again.")
        return Clip("learned", about.clip, about.revision, self.device, batch_size=self.batch_size)

    @cached_property
    def heads(self) -> list[Head]:
        """The members, frozen."""
        about, file = self.about, Path(self.path) / WEIGHTS
        try:
            if sha256(file) != about.heads_sha256:
                raise ValueError("it is not the file that was written with config.json")
            tensors = load_file(file)
            return [_head(about, tensors, f"{number}.", self.clip.network.device) for number in range(about.members)]
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            raise ConfigError(f"{file} cannot be read ({str(error).splitlines()[0]}); fit the reward again.") from error

    def _members(self, images: Sequence[Any] | Tensor, prompts: Sequence[str]) -> Tensor:
        """(members, N) scores."""
        seen, read = self.clip.pictures(images), self.clip.texts(prompts)
        unit = self.about.temperature if self.about.kind == "preferences" else 1.0
        return torch.stack([head(seen, read) for head in self.heads]) / unit

    def _combined(self, scores: Tensor) -> Tensor:
        mean = scores.mean(0)
        return mean - self.pessimism * scores.std(0, unbiased=False) if self.pessimism else mean


def write(folder: Path, about: About, heads: Sequence[Head], calibration: Mapping[str, Any]) -> None:
    """Write a learned reward; what was in the folder before is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{k}.{name}": value.contiguous() for k, head in enumerate(heads) for name, value in head.state_dict().items()
    }
    replace_file(folder / WEIGHTS, save(tensors))
    said = asdict(replace(about, heads_sha256=sha256(folder / WEIGHTS))) | {"calibration": dict(calibration)}
    replace_file(folder / CONFIG, json.dumps(said, indent=1).encode())


def clip_digest(model: str, revision: str | None = None) -> str:
    """SHA-256 over a model's weights, file by file."""
    files = sorted(folder_of(model, revision).glob("model*.safetensors"))
    return "-".join(sha256(file) for file in files)


def _head(about: About, tensors: Mapping[str, Tensor], prefix: str, device: torch.device) -> Head:
    head = Head(about.width, about.head)
    head.load_state_dict({name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)})
    return head.to(device).eval().requires_grad_(False)
