"""How far raters agree beyond chance: Krippendorff's alpha, kept up vote by vote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


class Agreement:
    """Krippendorff's alpha for categories without an order, any number of raters, and gaps.

    α = 1 - D_o / D_e = 1 - (n - 1)·(n - Σ_c o_cc) / (n² - Σ_c n_c²)

    over units with at least two values: n_c counts a category's values, n all of them, and o_cc is a unit's ordered
    pairs of equal values divided by its number of values minus one, summed over units. (Krippendorff, *Computing
    Krippendorff's Alpha-Reliability*, 2011.) 1 is perfect agreement, 0 that of chance, below 0 is less.
    """

    def __init__(self) -> None:
        self.units = 0  # with at least two values
        self._totals: Counter[str] = Counter()  # n_c
        self._equal: Counter[int] = Counter()  # values of a unit - 1 -> ordered pairs of equal ones, in all such units

    def change(self, before: Iterable[str], after: Iterable[str]) -> None:
        """One unit had the values `before`, and now has `after`; the work is that of one unit."""
        self._add(Counter(before), -1)
        self._add(Counter(after), 1)

    def _add(self, values: Counter[str], sign: int) -> None:
        count = values.total()
        if count < 2:
            return
        self.units += sign
        for category, number in values.items():
            self._totals[category] += sign * number
            self._equal[count - 1] += sign * number * (number - 1)

    @property
    def alpha(self) -> float | None:
        """None where it is not defined: nothing was judged twice, or all values are the same."""
        total = self._totals.total()
        expected = total**2 - sum(number**2 for number in self._totals.values())
        if not expected:
            return None
        equal = sum(pairs / others for others, pairs in self._equal.items())
        return 1 - (total - 1) * (total - equal) / expected


def alpha(units: Iterable[Iterable[str]]) -> float | None:
    """Krippendorff's alpha of units, each a list of the values it was given; see `Agreement`."""
    agreement = Agreement()
    for values in units:
        agreement.change((), values)
    return agreement.alpha
