"""A run folder as `tiller train` leaves it, with random trained weights: no training, no time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from tiller import config
from tiller.policy import Policy
from tiller.recipe import Recipe
from tiller.run import checkpoints
from tiller.run.checkpoints import Snapshot

SIZES = {"height": 16, "width": 16}


def finished_run(pipe: Any, folder: Path, sampling: dict[str, Any] | None = None, **model: Any) -> Path:
    """`folder/run` of a pipeline that is saved to `folder/base`: weights, an evaluation, pictures, settings."""
    pipe.save_pretrained(folder / "base")
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    model = {"lora_rank": 2, "lora_alpha": 3.0, **model}
    policy = Policy(pipe, **model)
    disturb(policy, 1)
    run = folder / "run"
    policy.save(run / "model")
    named = {"name": str(folder / "base"), "device": "cpu", **model}
    settings = {"model": named, "prompts": str(folder / "prompts.txt"), "sampling": sampling or SIZES}
    recipe = config.from_mapping(Recipe, {**settings, "train": {"epochs": 4, "ema_decay": 0.9}})
    (run / "config.yaml").write_text(config.to_yaml(recipe, complete=True))
    _results(run)
    return run


def disturb(policy: Policy, seed: int) -> None:
    """Other weights than those that training begins with."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters.values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def checkpoint(run: Path, policy: Policy, epoch: int) -> Path:
    """A checkpoint of the policy as it is; the running mean in it is twice the weights."""
    weights = {name: parameter.detach().clone().contiguous() for name, parameter in policy.parameters.items()}
    tensors = {f"weights.{name}": value for name, value in weights.items()}
    tensors |= {f"ema.{name}": 2 * value for name, value in weights.items()}
    return checkpoints.save(run / "checkpoints", Snapshot(tensors, {"epoch": epoch}), keep_last=9)


def best(run: Path, policy: Policy, epoch: int) -> None:
    """The weights that a watched run keeps of its best evaluation."""
    weights = {name: parameter.detach().clone().contiguous() for name, parameter in policy.parameters.items()}
    save_file(weights, run / "evaluation" / f"best-{epoch:06d}.safetensors")


def _results(run: Path) -> None:
    (run / "evaluation").mkdir()
    gained = {"base": -1.6, "tuned": -1.4, "difference": 0.2, "low": 0.1, "high": 0.3, "win_rate": 0.9, "count": 8}
    fell = {**gained, "base": 0.9, "tuned": 0.7, "difference": -0.2, "low": -0.3, "high": -0.1, "win_rate": 0.2}
    rows = [{"split": "held_out", "reward": "jpeg_compressibility", **gained}]
    rows.append({"split": "held_out", "reward": "<gold> | judge", **fell})
    (run / "evaluation" / "comparison.json").write_text(json.dumps(rows))
    drift = {"kl_to_base": 41.5, "diversity_base": 0.2, "diversity_tuned": 0.1}
    (run / "evaluation" / "drift.json").write_text(json.dumps(drift))
    found = [{"epoch": 2, "rule": "edges", "text": "the pictures' edges changed by -60%"}]
    (run / "evaluation" / "monitor.json").write_text(json.dumps({"rules": {}, "findings": found}))
    lines = [{"epoch": epoch, "optim/updates": epoch} for epoch in range(1, 5)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Image.new("RGB", (1800, 400), "red").save(run / "before_after.png")
