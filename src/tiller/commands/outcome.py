"""What training came to: base against tuned, split by split and reward by reward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from tiller.evaluation import Comparison, Evaluated, compare


@dataclass(frozen=True)
class Outcome:
    """Scores of both models on every split."""

    base: Mapping[str, Evaluated]
    tuned: Mapping[str, Evaluated]
    reward: str | None  # the one that was trained, or the first that is reported

    def comparisons(self) -> Iterator[tuple[str, str, Comparison]]:
        """(split, reward, comparison) for every split and reward that both models were scored on."""
        for split, before in self.base.items():
            after = self.tuned.get(split)
            for name, scores in before.scores.items():
                if after is not None and name in after.scores:
                    known = compare_or_none(scores, after.scores[name], before.prompts)
                    if known is not None:
                        yield split, name, known

    def to_data(self) -> list[dict[str, Any]]:
        """As plain data, for a JSON file."""
        return [{"split": split, "reward": name, **asdict(found)} for split, name, found in self.comparisons()]


def compare_or_none(base: Any, tuned: Any, prompts: Any) -> Comparison | None:
    """The comparison, or None where no picture has both scores (a reward that says nothing about these prompts)."""
    try:
        return compare(base, tuned, prompts)
    except ValueError:
        return None


def outcome_tables(outcome: Outcome) -> Iterator[Table]:
    """One table per reward, the trained one first, with a line per split."""
    rows = list(outcome.comparisons())
    first = () if outcome.reward is None else (outcome.reward,)
    for reward in dict.fromkeys([*first, *(name for _, name, _ in rows)]):
        yield _table(reward, [(split, found) for split, name, found in rows if name == reward])


def _table(reward: str, rows: Sequence[tuple[str, Comparison]]) -> Table:
    table = Table(title=f"{reward}, base → tuned: same prompts, same noise", title_justify="left", title_style="bold")
    table.add_column("prompts", no_wrap=True)
    for heading in ("base", "tuned", "difference (95 % interval)", "wins", "n"):
        table.add_column(heading, justify="right", no_wrap=True)
    for split, found in rows:
        table.add_row(
            split.replace("_", " "),
            f"{found.base:.3f}",
            f"{found.tuned:.3f}",
            f"{found.difference:+.3f} ({found.low:+.3f}, {found.high:+.3f})",
            f"{found.win_rate:.0%}",
            str(found.count),
        )
    return table
