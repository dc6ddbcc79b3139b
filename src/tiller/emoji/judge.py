"""The gold judge: a small network that reads off a picture what is in it, and the two rewards made of it.

Because scenes are drawn, the judge is trained on exact labels (`train_judge.py`), so that it can stand for the truth
against which any other reward is held.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from tiller.emoji.scenes import Facts, Scene, parse
from tiller.emoji.words import COLOURS, NOUNS, NUMBERS, PLACES, PROPS, RELATIONS, SIZES
from tiller.types import TillerError

WEIGHTS = Path(__file__).parent / "judge.safetensors"
CLASSES: dict[str, tuple[str, ...]] = {
    "first": NOUNS,  # of two nouns, the one that comes first in NOUNS
    "second": (*NOUNS, "dishes", "chess", "bike", "nothing"),
    "relation": RELATIONS,  # where the first is from the second
    "count": NUMBERS,  # of the first
    "size": (*SIZES, "middle"),
    "place": (*PLACES, "middle"),
    "colour": COLOURS,
}
"""What the judge tells apart, for each fact."""

PLAIN = ("count", "size", "place", "colour")  # the facts that are read directly
FLOOR = -10.0  # log-probabilities below this count as this, so that one fact cannot drown the others
_MIRRORED = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


class Judge(nn.Module):
    """Pictures (N, 3, 64, 64) in [-1, 1] to log-probabilities of every fact, {fact: (N, classes)}."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths = [(3, 32, 2), (32, 64, 1), (64, 96, 2), (96, 128, 1), (128, 192, 2), (192, 192, 1)]
        for before, after, stride in widths:
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers)  # (N, 192, 8, 8)
        self.what = nn.Conv2d(192, 256, 1)
        self.glyphs = nn.Linear(256, len(CLASSES["second"]))
        self.where = nn.Conv2d(192, 32, 1)
        self.join = nn.Linear(256 + 32 * 64, 224)
        self.heads = nn.ModuleDict({fact: nn.Linear(224, len(CLASSES[fact])) for fact in PLAIN})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        seen = self.body(pictures)
        what = F.relu(self.what(seen))  # (N, 256, 8, 8)
        most = what.amax((2, 3))  # (N, 256): what is there, wherever it is
        where = F.relu(self.where(seen)).flatten(1)  # (N, 2048)
        features = F.relu(self.join(torch.cat([most, where], dim=1)))
        read = {fact: head(features).float().log_softmax(-1) for fact, head in self.heads.items()}
        pairs = pair_log_probabilities(self.glyphs(most).float())  # (N, 73, 73)
        maps = torch.einsum("kc,nchw->nkhw", self.glyphs.weight, what).float()  # how much each place looks like each
        return read | {
            "first": pairs.logsumexp(2)[:, : len(NOUNS)],
            "second": pairs.logsumexp(1),
            "relation": relation_log_probabilities(maps, pairs),
        }

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> Judge:
        """The shipped judge, in fp32, ready to judge."""
        if not path.exists():
            raise TillerError(f"the judge's weights {path} are missing; reinstall tiller or train it anew")
        judge = cls()
        judge.load_state_dict({name: value.float() for name, value in load_file(path).items()})
        return judge.eval().requires_grad_(False)

    @torch.inference_mode()
    def facts(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Log-probabilities {fact: (N, classes)} for pictures of any size."""
        parts = [self(as_tensor(images[i : i + 64])) for i in range(0, len(images), 64)]
        return {fact: torch.cat([part[fact] for part in parts]) for fact in CLASSES}


def pair_log_probabilities(glyphs: Tensor) -> Tensor:
    """Of scores (N, K) for each glyph and, last, for nothing: log p(first, second), (N, K, K), first < second.

    p(a, b) is proportional to exp(score_a + score_b), so that pairs never seen together are as good as others.
    """
    count = glyphs.shape[1]
    ordered = torch.ones(count, count, dtype=torch.bool, device=glyphs.device).triu(1)
    scores = glyphs[:, :, None] + glyphs[:, None, :]
    scores = scores.masked_fill(~ordered, -1e4)
    return scores.flatten(1).log_softmax(-1).view_as(scores)


def relation_log_probabilities(maps: Tensor, pairs: Tensor) -> Tensor:
    """Where the first of the likeliest pair is from the second: (N, 4), from the centres of their maps (N, K, h, w)."""
    rows, count = torch.arange(len(maps), device=maps.device), pairs.shape[1]
    best = pairs.flatten(1).argmax(1)
    places = maps.flatten(2).softmax(-1).view_as(maps)  # each map as a distribution over places
    x = (places.sum(2) * torch.linspace(-1, 1, maps.shape[3], device=maps.device)).sum(-1)  # (N, K)
    y = (places.sum(3) * torch.linspace(-1, 1, maps.shape[2], device=maps.device)).sum(-1)
    right = x[rows, best // count] - x[rows, best % count]
    down = y[rows, best // count] - y[rows, best % count]
    return (8 * torch.stack([-right, right, -down, down], dim=1)).log_softmax(-1)


def as_tensor(images: Sequence[Image.Image]) -> Tensor:
    """(N, 3, 64, 64) float32 in [-1, 1]."""
    small = [im if im.size == (64, 64) else im.resize((64, 64), Image.Resampling.LANCZOS) for im in images]
    pixels = torch.from_numpy(np.stack([np.asarray(im.convert("RGB")) for im in small]))
    return pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1)


def stated(facts: Facts) -> dict[str, int]:
    """{fact: class} for what a caption states."""
    found: dict[str, int] = {}
    first, second, relation = facts.noun, facts.other, facts.relation
    if first and second and NOUNS.index(first) > NOUNS.index(second):
        first, second = second, first
        relation = _MIRRORED[relation] if relation else None
    if facts.activity:
        second, relation = PROPS[facts.activity], None
    names = {"first": first, "second": second, "relation": relation}
    names |= {"size": facts.size, "place": facts.place, "colour": facts.colour}
    for fact, name in names.items():
        if name is not None:
            found[fact] = CLASSES[fact].index(name)
    if facts.count is not None:
        found["count"] = facts.count - 1
    return found


def truth(scene: Scene) -> dict[str, int]:
    """{fact: class} for everything that can be seen in a drawn scene, stated or not."""
    facts = Facts(scene.noun, scene.count, scene.activity, scene.other, scene.relation, None, None, scene.colour)
    found = stated(facts)
    alone = scene.count == 1 and not scene.activity and not scene.other
    if not scene.activity and not scene.other:
        found["second"] = CLASSES["second"].index("nothing")
    if alone and not scene.place:
        found["size"] = CLASSES["size"].index(scene.size or "middle")
    if alone and not scene.size:
        found["place"] = CLASSES["place"].index(scene.place or "middle")
    return found


@lru_cache(maxsize=4)
def _shipped(device: str = "cpu") -> Judge:
    return Judge.load().to(device)


def gold_accuracy(
    images: Sequence[Image.Image], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> list[float | None]:
    """1 where every fact that the prompt states is the judge's first choice, else 0; None if it states none."""
    read = _shipped().facts(images) if images else {}
    scores: list[float | None] = []
    for i, prompt in enumerate(prompts):
        wanted = stated(parse(prompt))
        right = all(int(read[fact][i].argmax()) == index for fact, index in wanted.items())
        scores.append(float(right) if wanted else None)
    return scores


class Alignment:
    """Mean log-probability (nats, each at least `FLOOR`) of the facts that a prompt states; missing if it states none.

    Of PIL pictures a list, with None for missing. Of pictures as a tensor (N, 3, H, W) in [0, 1] a tensor (N,) with
    their graph, with NaN for missing.
    """

    __name__ = "alignment"
    differentiable = True

    def __call__(
        self, images: Sequence[Image.Image] | Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[float | None] | Tensor:
        if isinstance(images, Tensor):
            return _mean_logs(_shipped(str(images.device))(fitted(images) * 2 - 1), prompts)
        means = _mean_logs(_shipped().facts(images), prompts).tolist() if images else []
        return [None if math.isnan(mean) else mean for mean in means]


alignment = Alignment()


def _mean_logs(read: Mapping[str, Tensor], prompts: Sequence[str]) -> Tensor:
    """(N,) the mean over what each prompt states; NaN where that is nothing."""
    rows = []
    for i, prompt in enumerate(prompts):
        logs = [read[fact][i, index] for fact, index in stated(parse(prompt)).items()]
        rows.append(torch.stack(logs).clamp(min=FLOOR).mean() if logs else read["first"].new_tensor(math.nan))
    return torch.stack(rows)


def fitted(pictures: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) in [0, 1] at 64 x 64, resized as PIL does it: columns, then rows, each rounded to 8 bits.

    The gradient takes no notice of the rounding.
    """
    for axis in (3, 2):
        if pictures.shape[axis] != 64:
            weights = lanczos(pictures.shape[axis], 64).to(pictures)
            resized = (pictures.transpose(axis, 3) @ weights.T).transpose(axis, 3).clamp(0, 1)
            pictures = resized + ((resized * 255).round() / 255 - resized).detach()
    return pictures


def lanczos(before: int, after: int) -> Tensor:
    """(after, before) weights that resize `before` pixels to `after`, Lanczos with three lobes, antialiased."""
    scale = before / after
    centres = (torch.arange(after, dtype=torch.float64) + 0.5) * scale
    distance = (torch.arange(before, dtype=torch.float64) + 0.5 - centres[:, None]) / max(scale, 1)
    weights = torch.where(distance.abs() < 3, torch.sinc(distance) * torch.sinc(distance / 3), 0.0)
    return weights / weights.sum(1, keepdim=True)
