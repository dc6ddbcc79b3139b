"""Where prompts come from, what is held out, and which of them an epoch draws."""

from tiller.prompts.draw import draw
from tiller.prompts.sets import SETS, held_out
from tiller.prompts.sources import load

__all__ = ["SETS", "draw", "held_out", "load"]
