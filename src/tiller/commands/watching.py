"""Evaluations while a run goes on, and what its rules against over-optimisation make of them.

evaluation/in-run-base-0123abcd.json  the model before training, by what is looked at
evaluation/history.jsonl              one line per evaluation; all that the monitor knows is read from it
evaluation/monitor.json               the rules, what was found, what was done, the best epoch
evaluation/best-000030.safetensors    the trained weights of the best evaluation that lost nothing
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save

from tiller import reward_spec
from tiller.commands import building
from tiller.distributed import World
from tiller.evaluation import in_run
from tiller.evaluation.drift import thumbnails
from tiller.evaluation.in_run import InRun
from tiller.evaluation.monitor import Monitor, Seen, Verdict, findings, in_words
from tiller.policy import Policy
from tiller.recipe import Recipe
from tiller.rewards import Reward
from tiller.run.files import replace_file
from tiller.state import TrainState
from tiller.types import Prompt, RunError

KEPT = 2  # files of the best weights: the newest, and the one before, to which a resumed run may have to go back


class Watch:
    """Looks at a run every few epochs, and acts by its rules."""

    def __init__(
        self,
        policy: Policy,
        recipe: Recipe,
        splits: Mapping[str, Sequence[Prompt]],
        prompts: Sequence[Prompt],
        rewards: Mapping[str, Reward],
        state: TrainState,
        folder: Path,
        tell: Callable[[Any], None],
        world: World,
    ):
        settings = recipe.evaluation
        self.every = settings.every if settings.every <= recipe.train.epochs else 0  # else it would never be time
        self.folder, self.tell, self.world = folder / "evaluation", tell, world
        looked_at = [settings.pictures, settings.features, settings.sampling, recipe.held_out, list(rewards)]
        self.key = hashlib.sha256(json.dumps(looked_at, default=str).encode()).hexdigest()[:8]
        self.monitor = Monitor(settings.monitor)
        self.kept: list[tuple[Seen, Verdict]] = []
        self.rates = [group["lr"] for group in state.optimizer.param_groups]
        if not self.every:
            return
        paths = building.per_picture(recipe.sampling)
        self.eyes = InRun(
            policy,
            in_run.few(splits, prompts, settings.pictures),
            rewards,
            name if (name := reward_spec.heading(recipe.reward)) in rewards else None,
            recipe.train.seed,
            recipe.train.batch_size,
            paths | settings.sampling,
            paths,
            world,
            thumbnails if settings.features is None else partial(_features, settings.features, recipe.model.device),
        )
        if state.epoch and recipe.model.lora_rank is None and not self._base_file.exists():
            raise RunError("evaluation.every cannot be set in the middle of a full fine-tuning; leave it at 0.")
        self.base = self.eyes.base(self._base_file)
        self._recall(state)

    @property
    def ended(self) -> bool:
        """Whether the rules have stopped the run."""
        return self.monitor.ended

    def at(self, state: TrainState) -> dict[str, float]:
        """Look, if it is time to, and act; numbers for the log."""
        if not self.every or state.epoch % self.every:
            return {}
        with state.averaged():
            now = self.eyes.look()
            seen = self.eyes.compare(state.epoch, self.base, now)
        verdict = self.monitor.see(seen)
        self.kept.append((seen, verdict))
        if self.world.is_main:
            self._write(state, verdict)
        if verdict.findings:
            self.tell(in_words(verdict))
        if verdict.acts:
            self._act(state)
        return in_run.metrics(seen, now) | {"monitor/findings": float(len(verdict.findings))}

    def _act(self, state: TrainState) -> None:
        action, best = self.monitor.rules.action, self.monitor.best
        if action == "lower_rate":
            self._set_rate(state)
            self.tell(f"monitor: the learning rate is now {state.optimizer.param_groups[0]['lr']:.3g}")
        elif action == "stop":
            self.tell(f"monitor: stopped after epoch {state.epoch}")
        elif best is None:
            self.tell(
                f"monitor: stopped after epoch {state.epoch}; no evaluation before it lost nothing, to go back to"
            )
        else:
            self._roll_back(state, best[0])
            self.tell(f"monitor: stopped after epoch {state.epoch}, with the weights of epoch {best[0]}")

    def _set_rate(self, state: TrainState) -> None:
        for group, rate in zip(state.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.monitor.rate

    def _roll_back(self, state: TrainState, epoch: int) -> None:
        file = self._best_file(epoch)
        self.world.wait()
        if not file.exists():
            raise RunError(
                f"{file} is missing, so that the run cannot go back to it; set evaluation.monitor.action=stop."
            )
        state.replace_weights(load_file(file))

    def _recall(self, state: TrainState) -> None:
        """What was seen up to the checkpoint that the run goes on from; what came later will be seen again."""
        file = self.folder / "history.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        seen = [Seen.from_data(data) for line in lines if (data := _parsed(line)) and data["epoch"] <= state.epoch]
        self.kept = [(one, self.monitor.see(one)) for one in seen]
        self._set_rate(state)
        if self.ended and self.monitor.rules.action == "roll_back" and self.monitor.best is not None:
            self._roll_back(state, self.monitor.best[0])

    def _write(self, state: TrainState, verdict: Verdict) -> None:
        lines = (json.dumps(seen.to_data()) for seen, _ in self.kept)
        replace_file(self.folder / "history.jsonl", "".join(f"{line}\n" for line in lines).encode())
        if verdict.best:
            with state.averaged():
                weights = {name: value.cpu().contiguous() for name, value in state.weights().items()}
            replace_file(self._best_file(state.epoch), save(weights))
            for old in sorted(self.folder.glob("best-*.safetensors"))[:-KEPT]:
                old.unlink()
        best = self.monitor.best
        about = {
            "rules": asdict(self.monitor.rules),
            "findings": [
                {"epoch": seen.epoch, **asdict(found)}
                for seen, _ in self.kept
                for found in findings(seen, self.monitor.rules)
            ],
            "acted": self.monitor.acted,
            "best": None if best is None else {"epoch": best[0], "score": best[1]},
        }
        replace_file(self.folder / "monitor.json", json.dumps(about, indent=1).encode())

    @property
    def _base_file(self) -> Path:
        return self.folder / f"in-run-base-{self.key}.json"

    def _best_file(self, epoch: int) -> Path:
        return self.folder / f"best-{epoch:06d}.safetensors"


def _features(model: str, device: str, pictures: Sequence[Any]) -> np.ndarray:
    """(N, D) of a network that is loaded for the purpose."""
    from tiller.evaluation.features import Features

    return Features(model, device=device)(pictures).numpy()


def _parsed(line: str) -> Any:
    """A line of JSON, or None where a crash has torn it."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
