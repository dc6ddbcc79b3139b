"""One file per algorithm; the difference between two files is the difference between two papers."""

from tiller.algorithms.base import Algorithm
from tiller.algorithms.ddpo import DDPO
from tiller.algorithms.ddpo_sf import DDPOSF

__all__ = ["DDPO", "DDPOSF", "Algorithm"]
