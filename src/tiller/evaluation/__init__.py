"""Base against tuned model: fixed prompts, fixed noise, scores, and how sure one can be of the difference."""

from tiller.evaluation.drift import drift
from tiller.evaluation.held_out import Evaluated, draw_pictures, evaluate
from tiller.evaluation.paired import Comparison, compare

__all__ = ["Comparison", "Evaluated", "compare", "draw_pictures", "drift", "evaluate"]
