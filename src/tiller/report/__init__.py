"""What a run shows: sheets of pictures, curves, and lines on the terminal."""

from tiller.report.pictures import before_after, curve, sheet

__all__ = ["before_after", "curve", "sheet"]
