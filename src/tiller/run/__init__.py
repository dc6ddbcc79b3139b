"""The run folder: configuration, metrics, checkpoints that survive a kill at any moment, exact resume."""

from tiller.run.folder import Run
from tiller.run.interrupts import Interrupted, Interrupts

__all__ = ["Interrupted", "Interrupts", "Run"]
