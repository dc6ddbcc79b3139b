"""Runs side by side: means over seeds in one table, and the reward over reward calls and over time in one plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Row:
    """One run: a variant with one seed."""

    name: str
    seed: int
    metrics: Sequence[Mapping[str, Any]]  # lines of metrics.jsonl
    timings: Sequence[Mapping[str, Any]]  # lines of timings.jsonl
    compared: Sequence[Mapping[str, Any]]  # evaluation/comparison.json
    drift: Mapping[str, float]  # evaluation/drift.json

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return bool(self.compared)


def summarise(rows: Sequence[Row], split: str) -> list[dict[str, Any]]:
    """Per variant: means and sample standard deviations, over its finished seeds, of what the runs came to.

    One seed has no deviation: None.
    """
    summary = []
    for name in dict.fromkeys(row.name for row in rows):
        mine = [row for row in rows if row.name == name]
        done = [row for row in mine if row.finished]
        numbers = [_numbers(row, split) for row in done]
        keys = dict.fromkeys(key for one in numbers for key in one)
        summary.append(
            {
                "name": name,
                "seeds": len(done),
                "failed": len(mine) - len(done),
                **{
                    key: {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if values[1:] else None}
                    for key in keys
                    if (values := [one[key] for one in numbers if key in one and np.isfinite(one[key])])
                },
            }
        )
    return summary


def _numbers(row: Row, split: str) -> dict[str, float]:
    """One run's numbers: gains on the trained and the held-out prompts, drift, and what it cost."""
    found: dict[str, float] = {}
    for line in row.compared:
        if line["split"] in ("trained", split):
            where = "trained" if line["split"] == "trained" else "held-out"
            found[f"{where} {line['reward']}"] = line["tuned"]
            found[f"{where} {line['reward']} gain"] = line["difference"]
    base, tuned = row.drift.get("diversity_base"), row.drift.get("diversity_tuned")
    if base and tuned is not None:
        found["diversity kept"] = tuned / base
    if "kl_to_base" in row.drift:
        found["KL to base"] = row.drift["kl_to_base"]
    found["reward calls"] = row.metrics[-1]["reward_calls"]
    found["minutes"] = seconds(row)[-1] / 60
    return found


def seconds(row: Row) -> np.ndarray:
    """(epochs,) time since the start of training after each epoch, without evaluation."""
    spent = [[v for k, v in line.items() if k.startswith("time/") and k != "time/evaluate"] for line in row.timings]
    return np.cumsum([sum(one) for one in spent])


def table(summary: Sequence[Mapping[str, Any]]) -> str:
    """The summary as a Markdown table: gains, drift and cost; mean ± standard deviation over seeds."""
    keys = [
        key
        for key in dict.fromkeys(key for one in summary for key in one)
        if key.endswith(" gain") or key in ("KL to base", "diversity kept", "reward calls", "minutes")
    ]
    lines = ["| variant | seeds | " + " | ".join(keys) + " |", "|---" * (len(keys) + 2) + "|"]
    for one in summary:
        cells = [_cell(key, **one[key]) if key in one else "–" for key in keys]
        failed = f" ({one['failed']} failed)" if one["failed"] else ""
        lines.append(f"| {one['name']} | {one['seeds']}{failed} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(key: str, mean: float, std: float | None) -> str:
    """A gain with its sign, calls and nats as whole numbers, each with as many places as its deviation."""
    form = "+.3f" if key.endswith(" gain") else ",.0f" if key in ("KL to base", "reward calls") else ".2f"
    spread = f" ± {std:{form.strip('+')}}" if std else ""  # every seed has the same number of reward calls
    return f"{mean:{form}}{spread}"


def plot(rows: Sequence[Row], path: Path) -> Path:
    """The training reward over reward calls and over minutes: one line per variant, a band over its seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for name in dict.fromkeys(row.name for row in rows):
        mine = [row for row in rows if row.name == name and row.metrics]
        length = min((len(row.metrics) for row in mine), default=0)
        if not length:
            continue
        rewards = np.array([[line.get("reward/mean", np.nan) for line in row.metrics[:length]] for row in mine])
        calls = np.array([line["reward_calls"] for line in mine[0].metrics[:length]])
        minutes = np.mean([seconds(row)[:length] for row in mine], 0) / 60
        for panel, x in zip(panels, (calls, minutes), strict=True):
            (line,) = panel.plot(x, rewards.mean(0), label=name, linewidth=1.5)
            panel.fill_between(x, rewards.min(0), rewards.max(0), color=line.get_color(), alpha=0.12, linewidth=0)
    panels[0].set(xlabel="reward calls (pictures scored)", ylabel="mean reward of an epoch's pictures")
    panels[1].set(xlabel="minutes of training")
    for panel in panels:
        panel.grid(alpha=0.3)
    panels[1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
