"""`tiller train`: a recipe becomes a run folder with a better model, pictures, and numbers on held-out prompts."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from tiller import config
from tiller.commands import building
from tiller.commands.outcome import Outcome, outcome_table
from tiller.distributed import World
from tiller.evaluation import Evaluated, draw_pictures, evaluate
from tiller.policy import Policy
from tiller.prompts import load
from tiller.recipe import Recipe
from tiller.report import before_after, curve, sheet
from tiller.rewards import resolve
from tiller.run import Interrupts, Run
from tiller.state import TrainState
from tiller.train import Report, train
from tiller.types import Prompt, RunError


def run(recipe: Recipe, name: str, resume: bool = False) -> int:
    """Train as the recipe says, or go on where the run folder left off; returns the exit code."""
    prompts, reward, algorithm = load(recipe.prompts), resolve(recipe.reward), building.algorithm(recipe)
    splits, rewards, sampling = building.splits(recipe), building.rewards(recipe), building.per_picture(recipe.sampling)
    world, folder, console = World(), building.folder(recipe, name), Console(highlight=False)
    if resume and not (folder / "checkpoints").exists():
        raise RunError(f"{folder} holds no run to resume; leave out --resume to start one.")
    policy = building.policy(recipe.model, recipe.train.seed)
    record = Run.open(folder, config.to_mapping(recipe), keep_last=recipe.run.keep_last)
    say = console.print if world.is_main else (lambda *_: None)
    with record, Interrupts() as interrupts:
        state = TrainState(policy, recipe.train)
        resumed = record.restore(state)
        say(
            f"{recipe.model.name} → {recipe.reward}, run in {folder}"
            + (f", from epoch {state.epoch}" if resumed else "")
        )
        shown = Shown(policy, recipe, prompts, folder, world)
        base = _base_scores(policy, recipe, splits, rewards, folder, world)
        shown.pictures(state)
        started, first = time.monotonic(), state.epoch
        for report in train(
            policy, prompts, reward, algorithm, recipe.train, sampling=sampling, state=state, world=world
        ):
            record.log(report)
            say(_line(report, recipe, started, first))
            if report.epoch % recipe.run.checkpoint_every == 0 or report.epoch == recipe.train.epochs:
                record.save(state)
                shown.pictures(state)
            if interrupts.requested:
                record.save(state)
                say(f"stopped after epoch {report.epoch}; the same command goes on from there.")
                return interrupts.exit_code
        with state.averaged():
            policy.save(folder / "model") if world.is_main else None
            tuned = evaluate_policy(policy, recipe, splits, rewards, world)
        if world.is_main:
            _write_curve(folder, recipe.reward)
            _conclude(folder, Outcome(base, tuned, recipe.reward), console)
    return 0


class Shown:
    """The pictures a run shows: the same prompts and the same noise from step 0 on."""

    def __init__(self, policy: Policy, recipe: Recipe, prompts: list[Prompt], folder: Path, world: World):
        count = min(recipe.run.sample_prompts, len(prompts))
        self.prompts = [prompts[index * len(prompts) // count] for index in range(count)]
        self.policy, self.recipe, self.folder, self.world = policy, recipe, folder, world

    def pictures(self, state: TrainState) -> None:
        """Draw them, and lay them out beside the ones from before training."""
        if not self.prompts:
            return
        with state.averaged():
            drawn = draw_pictures(
                self.policy,
                self.prompts,
                2,
                self.recipe.train.seed,
                self.recipe.train.batch_size,
                building.per_picture(self.recipe.sampling) | self.recipe.evaluation.sampling,
                self.world,
            )
        if not self.world.is_main:
            return
        texts = [prompt.text for prompt in self.prompts]
        rows = [(text, drawn[2 * row : 2 * row + 2]) for row, text in enumerate(texts)]
        sheet(rows, self.folder / "images" / f"epoch-{state.epoch:06d}.png")
        folder = self.folder / "images" / "first"
        if state.epoch == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for number, picture in enumerate(drawn):
                picture.save(folder / f"{number:03d}.png")
            return
        from PIL import Image

        before = [Image.open(folder / f"{number:03d}.png") for number in range(len(drawn))]
        before_after([text for text in texts for _ in range(2)], before, drawn, self.folder / "before_after.png", 2)


def _base_scores(
    policy: Policy, recipe: Recipe, splits: Mapping[str, list[Prompt]], rewards: Mapping, folder: Path, world: World
) -> dict[str, Evaluated]:
    """The scores of the model as it was before training: made once, kept in the run folder."""
    file = folder / "evaluation" / "base.json"
    if file.exists():
        return {split: Evaluated.from_data(data) for split, data in json.loads(file.read_text()).items()}
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


def _conclude(folder: Path, outcome: Outcome, console: Console) -> None:
    write_scores(folder / "evaluation" / "tuned.json", outcome.tuned)
    (folder / "evaluation" / "comparison.json").write_text(json.dumps(outcome.to_data(), indent=1))
    console.print(outcome_table(outcome))
    console.print(f"pictures: {folder / 'before_after.png'}, curve: {folder / 'reward.png'}, model: {folder / 'model'}")


def _write_curve(folder: Path, reward: str) -> None:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    known = [line for line in lines if "reward/mean" in line]
    if known:
        calls, means, stds = ([line[key] for line in known] for key in ("reward_calls", "reward/mean", "reward/std"))
        curve(calls, means, stds, reward, folder / "reward.png")


def _line(report: Report, recipe: Recipe, started: float, first: int) -> str:
    """An epoch on one line: how far, the reward, the time left."""
    numbers = report.metrics
    per_epoch = (time.monotonic() - started) / (report.epoch - first)
    left = per_epoch * (recipe.train.epochs - report.epoch)
    missing = f"  missing {numbers['reward/missing']:.0f}" if numbers["reward/missing"] else ""
    reward = f"{numbers['reward/mean']:.4f} ± {numbers['reward/std']:.4f}" if "reward/mean" in numbers else "missing"
    return (
        f"epoch {report.epoch:>4}/{recipe.train.epochs}  reward {reward}{missing}  "
        f"grad {numbers.get('optim/grad_norm', float('nan')):.3f}  {per_epoch:.1f} s/epoch, {left / 60:.1f} min left"
    )
