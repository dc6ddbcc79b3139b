"""`tiller train`: a recipe becomes a run folder with a better model, pictures, and numbers on held-out prompts."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from tiller import config, reward_spec
from tiller.algorithms.base import Algorithm
from tiller.commands import building
from tiller.commands.outcome import Outcome, outcome_tables
from tiller.commands.report import summed_up
from tiller.commands.watching import Watch
from tiller.data import check_data, open_data
from tiller.distributed import World
from tiller.dry_run.solve import solved
from tiller.evaluation import Evaluated, draw_pictures, drift, evaluate
from tiller.metrics import memory
from tiller.policy import Policy
from tiller.preflight import preflight
from tiller.prompts import load
from tiller.recipe import Recipe
from tiller.report import before_after, curve, sheet
from tiller.report.listed import write_shown
from tiller.report.pictures import keep_stage
from tiller.report.rewards import table as rewards_table
from tiller.report.terminal import Terminal
from tiller.rewards import Reward
from tiller.rewards.serving.told import told
from tiller.run import Interrupts, Run, sick
from tiller.run import rewards as scales
from tiller.run.claim import REWARDS
from tiller.state import TrainState
from tiller.trackers import Tracker, tracker
from tiller.training import Report, check, train
from tiller.trial import calibrated
from tiller.types import Prompt, RunError, Scores


def run(recipe: Recipe, name: str, resume: bool = False) -> int:
    """Train as the recipe says, or go on where the run folder left off; returns the exit code."""
    folder = building.folder(recipe, name)
    recipe, geometry = solved(recipe, folder)
    prompts, rewards, algorithm = load(recipe.prompts), building.rewards(recipe, folder), building.algorithm(recipe)
    check_data(algorithm, recipe.reward, recipe.data)
    reward = rewards.get(reward_spec.heading(recipe.reward) or "")
    splits, sampling = building.splits(recipe), building.per_picture(recipe.sampling)
    world = World()
    terminal = Terminal(recipe.train.epochs, silent=not world.is_main)
    resolved = building.record(recipe)
    keep = recipe.run.keep_last
    opened = Run.open(folder, resolved, keep_last=keep, resume=resume, world=world, tell=terminal.say)
    with opened as record, terminal, told(terminal.say):
        if geometry:
            terminal.say(geometry)
        policy = building.policy(recipe.model, recipe.train.seed)
        building.check_call(policy, sampling | recipe.evaluation.sampling)
        check(policy, reward, algorithm, recipe.train, sampling, world)
        record.check_model(policy)
        record.trackers = _trackers(recipe, folder, resolved) if world.is_main else []
        state = TrainState(policy, recipe.train, algorithm)
        record.restore(state)
        data = open_data(recipe.data, policy, algorithm, prompts, sampling)
        seen = None
        if not state.epoch:
            seen = preflight(policy, prompts, reward, algorithm, sampling, recipe.train.seed, data)
        if reward is not None:
            if state.epoch or (folder / REWARDS).exists():
                reward = scales.restored(folder, reward)
            else:
                trial = (prompts, reward, algorithm, sampling, recipe.train.seed, world)
                reward = _calibrated(policy, *trial, seen, folder, terminal)
            record.check_scales(reward)
            rewards[next(iter(rewards))] = reward
        rewards = building.without_people(rewards)
        wanted = reward_spec.title(recipe.reward) or recipe.data
        terminal.say(f"{recipe.model.name} towards {wanted}, in {folder}, from epoch {state.epoch}")
        with Interrupts(record.save_last) as interrupts:
            shown = Shown(policy, recipe, prompts, record, world)
            base = _base_scores(policy, recipe, splits, rewards, folder, state)
            shown.pictures(state)
            watch = Watch(policy, recipe, splits, prompts, rewards, state, folder, terminal.say, world)
            pace = Pace(state.epoch, recipe.train.epochs)
            given: dict[str, Any] = {
                "sampling": sampling,
                "data": data,
                "state": state,
                "max_missing": recipe.run.max_missing,
            }
            reports = train(policy, prompts, reward, algorithm, recipe.train, world=world, **given)
            for report in interrupts.over(() if watch.ended else sick.watch(reports, folder, resolved, world)):
                looking = time.monotonic()
                report.metrics.update(watch.at(state))
                report.timings["time/evaluate"] = time.monotonic() - looking
                report.timings.update(memory(world.device))
                record.log(report)
                terminal.epoch(report.epoch, _line(report, pace))
                last = watch.ended or report.epoch == recipe.train.epochs
                if last or report.epoch % recipe.run.checkpoint_every == 0:
                    record.save(state)
                    shown.pictures(state)
                if watch.ended:
                    break
            with state.averaged():
                tuned = evaluate_policy(policy, recipe, splits, rewards, world)
                moved = _drift(policy, recipe, prompts)
                if world.is_main:
                    policy.save(folder / "model")
            if world.is_main:
                _conclude(folder, Outcome(base, tuned, next(iter(rewards), None)), moved, terminal)
            record.finish()
        if world.is_main:
            summed_up(folder, terminal.say)
    return 0


def _calibrated(
    policy: Policy,
    prompts: list[Prompt],
    reward: Reward,
    algorithm: Algorithm,
    sampling: Mapping[str, Any],
    seed: int,
    world: World,
    seen: Scores | None,
    folder: Path,
    terminal: Terminal,
) -> Reward:
    """The reward with its scales measured; what it looks like goes to the terminal and into the run's folder."""
    measured, found = calibrated(policy, prompts, reward, algorithm, sampling, seed, world, seen)
    if found is not None:
        if world.is_main:
            scales.write(folder, found)
        if len(found.rewards) > 1:
            terminal.say(rewards_table(found))
        for warning in found.warnings:
            terminal.say(f"warning: {warning}")
    return measured


def _trackers(recipe: Recipe, folder: Path, resolved: Mapping[str, Any]) -> list[Tracker]:
    return [tracker(name, folder.name, resolved, folder) for name in recipe.run.report_to]


class Shown:
    """The pictures a run shows: the same prompts and the same noise from step 0 on."""

    PER_PROMPT = 2
    DRIFT = 8  # prompts on which the distance from the base model is measured

    def __init__(self, policy: Policy, recipe: Recipe, prompts: list[Prompt], record: Run, world: World):
        count = min(recipe.run.sample_prompts, len(prompts))
        self.prompts = [prompts[index * len(prompts) // count] for index in range(count)]
        self.policy, self.recipe, self.record, self.world = policy, recipe, record, world

    def pictures(self, state: TrainState) -> None:
        """Draw them, and lay them out beside the ones from before training."""
        if not self.prompts:
            return
        with state.averaged():
            drawn = draw_pictures(
                self.policy,
                self.prompts,
                self.PER_PROMPT,
                self.recipe.train.seed,
                self.recipe.train.batch_size,
                building.per_picture(self.recipe.sampling) | self.recipe.evaluation.sampling,
                self.world,
            )
        if self.world.is_main:
            self._write(drawn, state.epoch)

    def _write(self, drawn: list[Image.Image], epoch: int) -> None:
        folder, first = self.record.images_dir, self.record.images_dir / "first"
        texts = [prompt.text for prompt in self.prompts for _ in range(self.PER_PROMPT)]
        rows = range(0, len(drawn), self.PER_PROMPT)
        sheet([(texts[row], drawn[row : row + self.PER_PROMPT]) for row in rows], folder / f"epoch-{epoch:06d}.png")
        keep_stage(folder, epoch, [prompt.text for prompt in self.prompts], drawn, self.PER_PROMPT)
        write_shown(folder, "last" if epoch else "first", texts, drawn)
        if epoch:
            before = [Image.open(first / f"{number:03d}.png") for number in range(len(drawn))]
            before_after(texts, before, drawn, folder.parent / "before_after.png", self.PER_PROMPT)


def _base_scores(
    policy: Policy,
    recipe: Recipe,
    splits: Mapping[str, list[Prompt]],
    rewards: Mapping,
    folder: Path,
    state: TrainState,
) -> dict[str, Evaluated]:
    """The scores of the model as it was before training, on these settings: made once, kept in the run folder."""
    settings = json.dumps([config.to_mapping(recipe.evaluation), recipe.held_out], sort_keys=True, default=str)
    file = folder / "evaluation" / f"base-{hashlib.sha256(settings.encode()).hexdigest()[:8]}.json"
    if file.exists():
        return {split: Evaluated.from_data(data) for split, data in json.loads(file.read_text()).items()}
    if state.epoch and recipe.model.lora_rank is None:
        raise RunError("evaluation settings cannot change in the middle of a full fine-tuning; put them back.")
    world = World()
    with policy.base():
        scores = evaluate_policy(policy, recipe, splits, rewards, world)
    if world.is_main:
        write_scores(file, scores)
    return scores


def evaluate_policy(
    policy: Policy, recipe: Recipe, splits: Mapping[str, list[Prompt]], rewards: Mapping, world: World | None = None
) -> dict[str, Evaluated]:
    """The scores of the policy as it is now, on every split, as the recipe's evaluation says."""
    return evaluate(
        policy,
        splits,
        rewards,
        recipe.evaluation.samples_per_prompt,
        recipe.train.seed,
        recipe.train.batch_size,
        building.per_picture(recipe.sampling) | recipe.evaluation.sampling,
        world,
    )


def write_scores(file: Path, scores: Mapping[str, Evaluated]) -> None:
    """Every score of every picture, as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({split: result.to_data() for split, result in scores.items()}))


def _drift(policy: Policy, recipe: Recipe, prompts: list[Prompt]) -> dict[str, float]:
    """How far the model has moved, on the first prompts; nothing for a full fine-tuning, which has no base left."""
    if recipe.model.lora_rank is None:
        return {}
    asked, sampling = prompts[: Shown.DRIFT], building.per_picture(recipe.sampling)
    per_prompt = max(2, recipe.evaluation.samples_per_prompt)  # two, to differ from each other
    return drift(policy, asked, per_prompt, recipe.train.seed, sampling)


def _conclude(folder: Path, outcome: Outcome, moved: Mapping[str, float], terminal: Terminal) -> None:
    write_scores(folder / "evaluation" / "tuned.json", outcome.tuned)
    (folder / "evaluation" / "drift.json").write_text(json.dumps(moved))
    (folder / "evaluation" / "comparison.json").write_text(json.dumps(outcome.to_data(), indent=1))
    _write_curve(folder, outcome.reward or "")
    for table in outcome_tables(outcome):
        terminal.say(table)
    if moved:
        terminal.say(
            f"distance from the base model: KL {moved['kl_to_base']:.1f} nats per picture; diversity within a prompt "
            f"{moved['diversity_base']:.3f} → {moved['diversity_tuned']:.3f}"
        )
    shown = {"pictures": "before_after.png", "curve": "reward.png", "model": "model"}
    made = (f"{what}: {folder / name}" for what, name in shown.items() if (folder / name).exists())
    terminal.say(", ".join(made))


def _write_curve(folder: Path, reward: str) -> None:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    known = [line for line in lines if "reward/mean" in line]
    if known:
        calls, means, stds = ([line[key] for line in known] for key in ("reward_calls", "reward/mean", "reward/std"))
        curve(calls, means, stds, reward, folder / "reward.png")


class Pace:
    """How long an epoch takes, and how long the rest will."""

    def __init__(self, first: int, last: int):
        self.first, self.last, self.started = first, last, time.monotonic()

    def at(self, epoch: int) -> tuple[float, float]:
        """Seconds per epoch so far, and minutes left."""
        per_epoch = (time.monotonic() - self.started) / max(1, epoch - self.first)
        return per_epoch, per_epoch * (self.last - epoch) / 60


def _line(report: Report, pace: Pace) -> str:
    """An epoch on one line: how far, the reward, the time left."""
    numbers = report.metrics
    per_epoch, left = pace.at(report.epoch)
    missing = f"  missing {numbers['reward/missing']:.0f}" if numbers.get("reward/missing") else ""
    reward = f"reward {numbers['reward/mean']:.4f} ± {numbers['reward/std']:.4f}" if "reward/mean" in numbers else ""
    if not reward:  # all are missing; or there are none to have, where pairs are trained on
        reward = "reward missing" if missing else f"loss {numbers.get('policy/loss', float('nan')):.4f}"
    return (
        f"epoch {report.epoch:>4}/{pace.last}  {reward}{missing}  "
        f"grad {numbers.get('optim/grad_norm', float('nan')):.3f}  {per_epoch:.1f} s/epoch, {left:.1f} min left"
    )
