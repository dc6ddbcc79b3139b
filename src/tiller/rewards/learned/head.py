"""A small network from the embeddings of a picture and its prompt to a score."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from tiller.types import ConfigError


@dataclass(frozen=True)
class HeadSettings:
    """For some hundreds of answers. Lee et al. 2023 (2302.12192, section 3.2) have 27,000, and two layers of 1024."""

    hidden: tuple[int, ...] = (64,)
    dropout: float = 0.2
    cosine: float = 10.0  # times CLIP's own cosine, where a head starts from; 0 leaves it out
    bounded: bool | None = None  # through a sigmoid; None: for labels, which lie in [0, 1]

    def __post_init__(self) -> None:
        if min(self.hidden, default=1) < 1 or not 0 <= self.dropout < 1:
            raise ConfigError("hidden sizes must be at least 1, and dropout in [0, 1).")


class Head(nn.Module):
    """Embeddings of pictures and prompts, (N, D) each and of length 1, to scores (N,).

    CLIP's own cosine, times a number that is fitted too, plus a network that sees both and their product, element by
    element. The network's last layer starts at 0, so that before anything is learned a head says what CLIP says.
    """

    def __init__(self, width: int, settings: HeadSettings):
        super().__init__()
        sizes, layers = [3 * width, *settings.hidden], []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(settings.dropout)]
        last = nn.Linear(sizes[-1], 1)
        if settings.cosine:
            nn.init.zeros_(last.weight)
        self.layers = nn.Sequential(*layers, last)
        self.gain = nn.Parameter(torch.ones(1))
        self.cosine, self.bounded = settings.cosine, bool(settings.bounded)

    def forward(self, pictures: Tensor, prompts: Tensor) -> Tensor:
        scale = pictures.shape[1] ** 0.5  # numbers of about 1
        seen = torch.cat([pictures * scale, prompts * scale, pictures * prompts * scale**2], dim=1)
        cosines = (pictures * prompts).sum(1)
        score = self.layers(seen).squeeze(1) + self.cosine * self.gain * cosines
        return score.sigmoid() if self.bounded else score
