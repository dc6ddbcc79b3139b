"""`tiller benchmark MODEL SUITE`: a suite drawn by a fixed protocol, scored, and compared with real pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from tiller import config, reward_spec
from tiller.commands import building
from tiller.commands.sample import open_run
from tiller.evaluation import distances, draw_pictures
from tiller.evaluation.features import Features
from tiller.policy import Policy
from tiller.prompts import suites
from tiller.prompts.suites import ALL, Asked
from tiller.recipe import Model
from tiller.reward_spec import RewardSetting
from tiller.rewards import resolve, score
from tiller.types import ConfigError, Scores

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
RESAMPLES = 2_000


@dataclass(frozen=True)
class Protocol:
    """All that decides the numbers, besides the model and the suite. It is written into the result."""

    samples_per_prompt: int = 4
    seed: int = 0
    batch_size: int = 16
    sampling: dict[str, Any] = field(default_factory=dict)  # the pipeline's call arguments
    rewards: RewardSetting = ()  # such as [clip_score, {name: geneval}]
    features: str | None = None  # a network (CLIP, DINOv2 ...), for distances to `reference`
    features_revision: str | None = None
    classifier: str | None = None  # a network with classes, for the Inception score
    classifier_revision: str | None = None
    reference: str | None = None  # a folder of real pictures
    device: str = "auto"

    def __post_init__(self) -> None:
        reward_spec.read_reported(self.rewards, "rewards")
        if self.samples_per_prompt < 1 or self.batch_size < 1:
            raise ConfigError("samples_per_prompt and batch_size must be at least 1.")
        if (self.reference is None) != (self.features is None):
            raise ConfigError(
                "reference and features belong together: real pictures, and a network that looks at both."
            )
        if not (self.rewards or self.reference or self.classifier):
            raise ConfigError("there is nothing to measure; name rewards, reference and features, or a classifier.")


def run(model: str, suite: str, output: Path, overrides: Sequence[str]) -> int:
    """Draw the suite, measure, print the tables, and keep everything as JSON in `output`."""
    protocol = config.load(Protocol, None, overrides)
    asked = suites.read(suite)
    real = _real(protocol.reference) if protocol.reference else []
    policy, sampling = _policy(model, protocol)
    prompts = [one.prompt for one in asked]
    pictures = draw_pictures(policy, prompts, protocol.samples_per_prompt, protocol.seed, protocol.batch_size, sampling)
    del policy
    rows = [one for one in asked for _ in range(protocol.samples_per_prompt)]
    scores = dict(_scores(protocol, pictures, rows))
    found = {
        "protocol": _written(model, suite, len(asked), protocol, sampling),
        "scores": {name: _summary(values, rows) for name, values in scores.items()},
        "missing": {name: int((~np.isfinite(values)).sum()) for name, values in scores.items()},
        "distances": _distances(protocol, pictures, real),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=1))
    _tell(found, output)
    return 0


def _policy(model: str, protocol: Protocol) -> tuple[Policy, dict[str, Any]]:
    if (Path(model) / "config.yaml").exists():
        recipe, policy = open_run(Path(model))
        call = building.per_picture(recipe.sampling) | recipe.evaluation.sampling | protocol.sampling
    else:
        policy = building.policy(Model(name=model, lora_rank=None, device=protocol.device), protocol.seed)
        call = building.per_picture(protocol.sampling)
    building.check_call(policy, call)
    return policy, call


def _scores(protocol: Protocol, pictures: Sequence[Any], rows: Sequence[Asked]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, (N,) scores) of every reward and of its named parts."""
    texts, about = [one.prompt.text for one in rows], [one.prompt.metadata for one in rows]
    for spec in reward_spec.read_reported(protocol.rewards, "rewards"):
        scored: Scores = score(resolve(spec.name, spec.settings, spec.key), pictures, texts, about)
        yield spec.label, scored.values
        yield from ((f"{spec.label}[{part}]", values) for part, values in scored.components.items())


def _summary(values: np.ndarray, rows: Sequence[Asked]) -> dict[str, dict[str, Any]]:
    """Per category and over all pictures: mean, 95 % bootstrap interval over prompts, number of scored pictures.

    `mean of categories`, which GenEval reports, gives every category the same weight.
    """
    categories = np.array([one.category for one in rows])
    texts = np.array([one.prompt.text for one in rows])
    names = [name for name in dict.fromkeys(categories) if name != ALL]
    found = {name: _mean(values[categories == name], texts[categories == name]) for name in names}
    if len(names) > 1:
        means = [one["mean"] for one in found.values() if one["mean"] is not None]
        found["mean of categories"] = {"mean": float(np.mean(means)) if means else None, "count": len(values)}
    return found | {ALL: _mean(values, texts)}


def _mean(values: np.ndarray, texts: np.ndarray) -> dict[str, Any]:
    known = np.isfinite(values)
    if not known.any():
        return {"mean": None, "count": 0}
    _, groups = np.unique(texts[known], return_inverse=True)
    sums, counts = np.bincount(groups, values[known]), np.bincount(groups)
    drawn = np.random.default_rng(0).integers(len(sums), size=(RESAMPLES, len(sums)))
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), [2.5, 97.5])
    mean = float(values[known].mean())
    return {"mean": mean, "low": float(low), "high": float(high), "count": int(known.sum())}


def _real(folder: str) -> list[Image.Image]:
    files = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in PICTURES)
    if not files:
        raise ConfigError(f"there are no pictures ({', '.join(PICTURES)}) in {folder}; name a folder of real pictures.")
    pictures = []
    for file in files:
        try:
            with Image.open(file, formats=("PNG", "JPEG", "WEBP")) as picture:
                pictures.append(picture.convert("RGB"))
        except (OSError, Image.DecompressionBombError) as error:
            raise ConfigError(f"{file} cannot be read as a picture: {error}; mend or remove it.") from error
    return pictures


def _distances(protocol: Protocol, pictures: Sequence[Any], real: Sequence[Image.Image]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if protocol.features is not None:
        look = Features(protocol.features, protocol.features_revision, "features", protocol.device, protocol.batch_size)
        ours, theirs = look(pictures), look(real)
        mean, deviation = distances.kernel_distance(theirs, ours, protocol.seed)
        precision, recall = distances.precision_recall(theirs, ours)
        found |= {"kernel distance": mean, "its deviation": deviation, "precision": precision, "recall": recall}
        found["frechet distance"] = distances.frechet_distance(theirs, ours)
    if protocol.classifier is not None:
        network = (protocol.classifier, protocol.classifier_revision)
        logits = Features(*network, "logits", protocol.device, protocol.batch_size)(pictures)
        found["inception score"] = distances.inception_score(logits)
    return found


def _written(model: str, suite: str, count: int, protocol: Protocol, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """What another one needs to make the same numbers again."""
    file = Path(suite)
    packages = ("tiller", "torch", "diffusers", "transformers", "torchmetrics")
    return config.to_mapping(protocol, complete=True) | {
        "model": Path(model).name if Path(model).exists() else model,
        "suite": file.name,
        "suite_sha256": hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None,
        "prompts": count,
        "sampling": dict(sampling),
        "versions": {name: metadata.version(name) for name in packages},
    }


def _tell(found: Mapping[str, Any], output: Path) -> None:
    console = Console(highlight=False)
    for name, summary in found["scores"].items():
        table = Table(title=name, title_justify="left", title_style="bold")
        for heading in ("category", "mean", "95 % interval", "pictures"):
            table.add_column(heading, justify="left" if heading == "category" else "right", no_wrap=True)
        for category, one in summary.items():
            interval = f"{one['low']:.3f}, {one['high']:.3f}" if "low" in one else ""
            mean = "no score" if one["mean"] is None else f"{one['mean']:.3f}"
            table.add_row(category, mean, interval, str(one["count"]))
        console.print(table)
    for name, value in found["distances"].items():
        console.print(f"{name}: {value:.4g}")
    console.print(f"protocol and numbers: {output}")
