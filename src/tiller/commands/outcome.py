"""What training came to: base against tuned, split by split and reward by reward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from tiller.evaluation import Comparison, Evaluated, compare


@dataclass(frozen=True)
class Outcome:
    """Scores of both models on every split."""

    base: Mapping[str, Evaluated]
    tuned: Mapping[str, Evaluated]
    reward: str  # the one that was trained

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


def outcome_table(outcome: Outcome) -> Table:
    """One line per split and reward, the trained reward first."""
    table = Table(title="base → tuned, same prompts, same noise, neither trained on", title_justify="left")
    for heading in ("prompts", "reward", "base", "tuned", "difference (95 % interval)", "wins", "pictures"):
        table.add_column(heading, justify="left" if heading in ("prompts", "reward") else "right")
    rows = sorted(outcome.comparisons(), key=lambda row: row[1] != outcome.reward)
    for split, name, found in rows:
        table.add_row(
            split.replace("_", " "),
            name,
            f"{found.base:.4f}",
            f"{found.tuned:.4f}",
            f"{found.difference:+.4f} ({found.low:+.4f} … {found.high:+.4f})",
            f"{found.win_rate:.0%}",
            str(found.count),
        )
    return table
