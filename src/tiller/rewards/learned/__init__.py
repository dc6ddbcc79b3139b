"""Rewards learned from preferences or labels: small heads on frozen CLIP embeddings."""

from tiller.rewards.learned.head import Head, HeadSettings
from tiller.rewards.learned.reward import Learned

__all__ = ["Head", "HeadSettings", "Learned"]
