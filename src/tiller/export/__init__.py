"""What leaves the tool: a run's weights in the names that other programs read, with a card, checked by reading back."""

from tiller.export.families import Family, family_of
from tiller.export.source import Trained, read_run

__all__ = ["Family", "Trained", "family_of", "read_run"]
