"""The rewards of a recipe beside each other, as a table on the terminal."""

from __future__ import annotations

from rich.table import Table

from tiller.rewards.scale import Beside


def table(found: Beside) -> Table:
    """A line per reward: its raw scores, its weight and scale, and its correlation with each."""
    title = f"rewards on {found.pictures} pictures before training; r is the correlation with each"
    made = Table(title=title, title_justify="left", title_style="bold")
    made.add_column("reward", no_wrap=True)
    headings = ["weight", "mean", "std", "min", "max", "missing", "normalised by"]
    for heading in [*headings, *(f"r {number}" for number in range(1, len(found.rewards) + 1))]:
        made.add_column(heading, justify="right", no_wrap=True)
    for number, ((name, one), row) in enumerate(zip(found.rewards.items(), found.correlations, strict=True), start=1):
        scale = f"{one.scale.mean:.4g}, {one.scale.std:.3g}" if one.scale else ""
        numbers = [_short(value) for value in (one.mean, one.std, one.min, one.max)]
        correlations = ["" if r is None else f"{r:+.2f}" for r in row]
        made.add_row(f"{number} {name}", f"{one.weight:g}", *numbers, f"{one.missing:.0%}", scale, *correlations)
    return made


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
