"""Curves as inline SVG: coloured by the page's style sheet, so that they follow its light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tiller.report.markup import Markup, join, tag

MOST_POINTS = 400  # of a line; more are not to be seen, and make the page heavy
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 34  # room for the axes, in units of the drawing


@dataclass(frozen=True)
class Line:
    """One curve; `low` and `high` are the edges of a band around it, if it has one."""

    name: str
    x: np.ndarray  # (n,)
    y: np.ndarray  # (n,) NaN where there is none
    low: np.ndarray | None = None
    high: np.ndarray | None = None

    @property
    def values(self) -> np.ndarray:
        """Everything that must fit onto the chart."""
        parts = [part for part in (self.y, self.low, self.high) if part is not None]
        joined = np.concatenate(parts)
        return joined[np.isfinite(joined)]


def chart(
    lines: Sequence[Line], title: str, x_label: str, size: tuple[int, int] = (360, 210), zero: bool = False
) -> Markup | None:
    """The curves on common axes; None where there is no number to draw. `title` is what a screen reader says."""
    drawn = [line for line in lines if len(line.values)]
    if not drawn:
        return None
    values = np.concatenate([line.values for line in drawn])
    known = np.concatenate([line.x[np.isfinite(line.y)] for line in drawn])
    across = _Scale(known.min(), known.max(), LEFT, size[0] - RIGHT)
    low, high = (min(values.min(), 0.0) if zero else values.min()), values.max()
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    up = _Scale(low - (0 if zero and low == 0 else room), high + room, size[1] - BOTTOM, TOP)
    return tag(
        "svg",
        tag("title", f"{title}: {described(drawn, x_label)}"),
        _grid(across, up, size, x_label),
        *(_curve(thinned(line), across, up, number) for number, line in enumerate(drawn)),
        viewBox=f"0 0 {size[0]} {size[1]}",
        role="img",
        class_="chart",
    )


def described(lines: Sequence[Line], x_label: str) -> str:
    """The curves in words, for those who do not see them."""
    parts = []
    for line in lines:
        seen = line.y[np.isfinite(line.y)]
        if len(seen):
            parts.append(
                f"{line.name} from {short(seen[0])} to {short(seen[-1])}, lowest {short(seen.min())}, highest "
                f"{short(seen.max())}"
            )
    return f"{'; '.join(parts)}; over {x_label}"


def thinned(line: Line) -> Line:
    """At most `MOST_POINTS` points, the first and the last among them."""
    if len(line.x) <= MOST_POINTS:
        return line
    kept = np.unique(np.linspace(0, len(line.x) - 1, MOST_POINTS).round().astype(int))
    low, high = (None if part is None else part[kept] for part in (line.low, line.high))
    return Line(line.name, line.x[kept], line.y[kept], low, high)


def short(value: float) -> str:
    """A number in as few characters as it takes."""
    if not math.isfinite(value):
        return "–"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        mantissa, power = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(power)}".replace("-", "−")
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}").replace("-", "−")


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between two others: 1, 2, 2.5 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


@dataclass(frozen=True)
class _Scale:
    """From numbers to places."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return round(self.start + share * (self.end - self.start), 1)


def _grid(across: _Scale, up: _Scale, size: tuple[int, int], x_label: str) -> Markup:
    parts: list[Markup] = []
    for value in ticks(up.low, up.high, 5):
        y = up(value)
        parts.append(tag("line", x1=LEFT, x2=size[0] - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", short(value), x=LEFT - 6, y=y + 4, class_="tick end"))
    below = [
        tag("text", short(value), x=across(value), y=size[1] - BOTTOM + 15, class_="tick middle")
        for value in ticks(across.low, across.high, max(3, size[0] // 110))
    ]
    middle = (LEFT + size[0] - RIGHT) / 2
    return join([*parts, *below, tag("text", x_label, x=middle, y=size[1] - 4, class_="tick middle label")])


def _curve(line: Line, across: _Scale, up: _Scale, number: int) -> Markup:
    parts = []
    if line.low is not None and line.high is not None:
        whole = np.isfinite(line.low) & np.isfinite(line.high)
        there = [(across(x), up(y)) for x, y in zip(line.x[whole], line.high[whole], strict=True)]
        back = [(across(x), up(y)) for x, y in zip(line.x[whole][::-1], line.low[whole][::-1], strict=True)]
        if there:
            parts.append(tag("polygon", points=_points(there + back), class_=f"band c{number % 6}"))
    known = np.isfinite(line.y)
    places = [(across(x), up(y)) for x, y in zip(line.x[known], line.y[known], strict=True)]
    if len(places) == 1:
        parts.append(tag("circle", cx=places[0][0], cy=places[0][1], r=3, class_=f"dot c{number % 6}"))
    else:
        parts.append(tag("polyline", points=_points(places), class_=f"line c{number % 6}"))
    return join(parts)


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in places)


def interval(low: float, middle: float, high: float, reach: float) -> Markup:
    """A difference with its interval on an axis from -reach to reach, as a small drawing beside a number."""
    scale = _Scale(-reach, reach, 2, 118)
    sign = "up" if low > 0 else "down" if high < 0 else "same"
    return tag(
        "svg",
        tag("line", x1=60, x2=60, y1=0, y2=16, class_="zero"),
        tag("line", x1=scale(low), x2=scale(high), y1=8, y2=8, class_=f"whisker {sign}"),
        tag("circle", cx=scale(middle), cy=8, r=3.5, class_=f"dot {sign}"),
        viewBox="0 0 120 16",
        class_="interval",
        aria_hidden="true",
    )
