"""Rewards: any function `(images, prompts, metadata) -> scores`, and what Tiller does around one."""

from tiller.rewards.background import Background
from tiller.rewards.check import describe
from tiller.rewards.contract import Reward, score
from tiller.rewards.jpeg import jpeg_compressibility, jpeg_incompressibility
from tiller.rewards.mix import Mix, Part
from tiller.rewards.patience import within
from tiller.rewards.resolve import resolve

__all__ = [
    "Background",
    "Mix",
    "Part",
    "Reward",
    "describe",
    "jpeg_compressibility",
    "jpeg_incompressibility",
    "resolve",
    "score",
    "within",
]
