"""Whether a picture has the objects, counts, colours and positions of its prompt: GenEval's checks as a reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from tiller.rewards.scorers.clauses import Detection, Verdict, check, included, kept
from tiller.rewards.scorers.clip import Clip
from tiller.rewards.scorers.detector import Detector
from tiller.rewards.scorers.pixels import rgb, unit
from tiller.rewards.scorers.reader import HOLE
from tiller.types import ConfigError, Score

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
WORDINGS = ("a photo of a {0} {1}", "a photo of a {0}-colored {1}", "a photo of a {0} object")
PARTS = ("soft", "strict", "both")


@dataclass(frozen=True)
class GenEval:
    """GenEval's strict score, its soft one, or both as named parts, from the metadata of GenEval's own file.

    The detector is an open-vocabulary one in the place of GenEval's Mask2Former, so the numbers are not GenEval's:
    its scores are on another scale (set the thresholds to it), it finds things twice (hence `overlap`), and crops have
    no masks. Colours are CLIP's likeliest of ten on each crop.
    """

    deterministic: ClassVar[bool] = True

    part: str = "soft"  # or strict, or both: their sum, each in the log
    model: str = "IDEA-Research/grounding-dino-base"
    revision: str | None = None  # by default the one that tiller pins
    query: str = ""  # what the detector is asked, with {} for the class; by default what it was trained with
    threshold: float = 0.3  # of a detection's score
    counting_threshold: float = 0.9  # where the tag is "counting"
    overlap: float = 0.5  # of a surer box of the same class, above which a box is the same object; 1 keeps all
    colour_model: str = "openai/clip-vit-large-patch14"
    colour_revision: str | None = None
    device: str = "auto"
    dtype: str = "float32"
    batch_size: int = 8  # pictures per forward

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ConfigError(f"geneval: part is {self.part!r}; name {', '.join(PARTS[:-1])} or {PARTS[-1]}.")
        if self.query and HOLE not in self.query:
            raise ConfigError(f"geneval: the query {self.query!r} has no {HOLE}, which stands for the class.")

    @cached_property
    def detector(self) -> Detector:
        """The model that finds, loaded at its first use."""
        return Detector(self.model, self.revision, self.query, self.device, self.dtype, self.batch_size)

    @cached_property
    def clip(self) -> Clip:
        """The model that tells colours, loaded at its first use."""
        return Clip("geneval", self.colour_model, self.colour_revision, self.device, "float32", self.batch_size)

    def __call__(
        self, images: Sequence[Any], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[Score] | dict[str, list[Score]]:
        """N scores, or N per part; what is wrong with a picture is the note."""
        pictures = rgb(images, "geneval")
        verdicts = self.verdicts(pictures, metadata)
        scores = {part: [_score(verdict, part) for verdict in verdicts] for part in PARTS[:-1]}
        return scores if self.part == "both" else scores[self.part]

    def verdicts(self, pictures: Sequence[Image.Image], metadata: Sequence[Mapping[str, Any]]) -> list[Verdict | None]:
        """Of each picture; None where its metadata demands nothing."""
        asked = [(at, name) for at, known in enumerate(metadata) for name in _classes(known)]
        boxes = self.detector.find([pictures[at] for at, _ in asked], [name for _, name in asked])
        found: list[dict[str, list[Detection]]] = [{} for _ in pictures]
        for (at, name), detections in zip(asked, boxes, strict=True):
            sure = self.counting_threshold if metadata[at].get("tag") == "counting" else self.threshold
            found[at][name] = kept(detections, sure, self.overlap)
        return [
            check(known, found[at], partial(self.colours, pictures[at])) if included(known) else None
            for at, known in enumerate(metadata)
        ]

    @torch.no_grad()
    def colours(self, picture: Image.Image, name: str, seen: Sequence[Detection]) -> list[str]:
        """The likeliest colour of each detection, by the cosine of its crop with the mean of three wordings."""
        crops = [picture.crop(_pixels(one, picture)) for one in seen]
        likeness = self.clip.pictures(crops) @ self._palette(name).T  # (crops, colours)
        return [COLOURS[index] for index in likeness.argmax(1).tolist()]

    def _palette(self, name: str) -> Tensor:
        """(colours, D) vectors of length 1."""
        texts = [wording.format(colour, name) for colour in COLOURS for wording in WORDINGS]
        return unit(self.clip.texts(texts).unflatten(0, (len(COLOURS), len(WORDINGS))).mean(1))


def _classes(metadata: Mapping[str, Any]) -> list[str]:
    """Every class that the metadata names, once."""
    clauses = [*included(metadata), *(metadata.get("exclude") or ())] if included(metadata) else []
    return list(dict.fromkeys(clause["class"] for clause in clauses))


def _pixels(one: Detection, picture: Image.Image) -> tuple[int, int, int, int]:
    """A detection's box in whole pixels inside the picture, at least one wide and high."""
    left, top = (min(max(int(one.box[i]), 0), picture.size[i] - 1) for i in (0, 1))
    right, bottom = (min(max(round(one.box[i + 2]), (left, top)[i] + 1), picture.size[i]) for i in (0, 1))
    return left, top, right, bottom


def _score(verdict: Verdict | None, part: str) -> Score:
    if verdict is None:
        return Score(None, "the metadata has no include, so nothing is demanded")
    return Score(verdict.strict if part == "strict" else verdict.soft, note="; ".join(verdict.faults))
