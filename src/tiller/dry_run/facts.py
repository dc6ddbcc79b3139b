"""What the algorithms of a recipe ask for, as a table, so that nothing heavy is imported to count calls.

`tests/test_dry_run.py` holds every line of it against the class itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tiller.choice import Chosen


@dataclass(frozen=True)
class Facts:
    """Of one algorithm with a recipe's settings."""

    walk: str = "recorded"  # or noised, or live
    whole_groups: bool = False
    needs: int = 0  # copies of the weights that are asked, without a graph, at every trained step
    reference_by_kl: bool = False  # one of these is asked only where kl_coefficient is not 0
    copies: int = 0  # of the trained weights, that are kept in memory
    last_left_out: bool = False  # the last step is never trained
    settings: Mapping[str, Any] = field(default_factory=dict)  # the defaults that count

    def trained(self, steps: int) -> int:
        """How many of a rollout's steps one pass through an epoch's samples trains."""
        eligible = max(1, steps - self.last_left_out)
        eligible = min(int(self.settings.get("window_size", eligible)), eligible)
        if "train_timesteps" in self.settings:
            return min(int(self.settings["train_timesteps"]), eligible)
        return max(1, round(float(self.settings.get("timestep_fraction", 1.0)) * eligible))

    @property
    def asked(self) -> int:
        """Copies asked per trained step, with these settings."""
        unused = self.reference_by_kl and not self.settings.get("kl_coefficient")
        return self.needs - unused


_GRPO = {"inner_epochs": 1, "timestep_fraction": 1.0}
TABLE: Mapping[str, Facts] = {
    "ddpo": Facts(settings={"inner_epochs": 1, "timestep_fraction": 1.0}),
    "ddpo_sf": Facts(settings={"timestep_fraction": 1.0}),
    "rwr": Facts("noised", settings={"inner_epochs": 5, "timestep_fraction": 1.0}),
    "rwr_sparse": Facts("noised", settings={"inner_epochs": 5, "timestep_fraction": 1.0}),
    "sft": Facts("noised", settings=_GRPO),
    "flow_grpo": Facts(needs=1, reference_by_kl=True, last_left_out=True, settings={**_GRPO, "kl_coefficient": 0.04}),
    "flow_grpo_fast": Facts(
        needs=1, reference_by_kl=True, settings={"inner_epochs": 1, "window_size": 2, "kl_coefficient": 0.0}
    ),
    "dance_grpo": Facts(last_left_out=True, settings={"inner_epochs": 1, "timestep_fraction": 0.6}),
    "mix_grpo": Facts(settings={"inner_epochs": 1, "window_size": 4}),
    "draft": Facts("live", settings={"inner_epochs": 1, "last_steps": 1}),
    "draft_lv": Facts("live", settings={"inner_epochs": 1}),
    "align_prop": Facts("live", settings={"inner_epochs": 1}),
    "refl": Facts("live", settings={"inner_epochs": 1}),
    "nft": Facts("noised", needs=2, reference_by_kl=True, copies=1, settings={**_GRPO, "kl_coefficient": 1e-4}),
    "awm": Facts(
        "noised",
        needs=2,
        reference_by_kl=True,
        copies=1,
        settings={"inner_epochs": 1, "train_timesteps": 6, "kl_coefficient": 0.003},
    ),
    "dgpo": Facts(
        "noised",
        True,
        needs=2,
        copies=1,
        settings={"inner_epochs": 1, "train_timesteps": 4, "kl_coefficient": 0.02},
    ),
    "crd": Facts("noised", True, needs=2, reference_by_kl=True, copies=2, settings={**_GRPO, "kl_coefficient": 0.1}),
    "dpo": Facts("noised", True, needs=1, settings=_GRPO),
    "d3po": Facts("recorded", True, needs=1, settings=_GRPO),
    "dpok": Facts(
        needs=1,
        reference_by_kl=True,
        settings={"inner_epochs": 5, "timestep_fraction": 0.1, "kl_coefficient": 0.01},
    ),
    "lee": Facts("noised", settings={**_GRPO, "data_weight": 1.0}),
    "ppo": Facts(needs=1, reference_by_kl=True, settings={**_GRPO, "kl_coefficient": 0.01, "data_weight": 0.0}),
    "adjoint_matching": Facts(needs=1, settings={"inner_epochs": 1, "train_timesteps": 4}),
}


def facts_of(chosen: Chosen) -> Facts | None:
    """The line of the table with the recipe's own settings; None for an algorithm that is not tiller's."""
    known = TABLE.get(chosen.name)
    return None if known is None else replace(known, settings={**known.settings, **chosen.settings})
