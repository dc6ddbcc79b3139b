"""The speed of this machine on a recipe's model, measured: a drawing, a replay with gradients, a decoding."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tiller.commands import building
from tiller.dry_run.headers import Files
from tiller.dry_run.memory import branches, row_cost
from tiller.dry_run.network import decoder_cost, picture_size
from tiller.prompts import load
from tiller.recipe import Recipe

STEPS = 3  # of the drawing
LARGEST = 16  # pictures


def measure(recipe: Recipe, files: Files) -> dict[str, float]:
    """Operations per second: of the denoiser, of the denoiser with a gradient, of the decoder. Loads the model."""
    policy = building.policy(recipe.model, recipe.train.seed)
    size = max(1, min(LARGEST, recipe.train.batch_size))
    prompts = [load(recipe.prompts)[0].text] * size
    call = {**building.per_picture(recipe.sampling), "num_inference_steps": STEPS}
    own = building.algorithm(recipe).kernel
    kernel = None if own is None or own.deterministic else own  # without noise there is no step to replay

    def drawn(kind: str) -> Any:
        return policy.sample(prompts, seed=0, kernel=kernel, **{**call, "output_type": kind})

    def replay() -> None:
        policy.replay(rollout, lambda step: step.backward(step.log_prob.sum()))

    rollout = drawn("latent")  # warms up, too
    drawing, whole = best(lambda: drawn("latent")), best(lambda: drawn("pil"))
    cost = row_cost(files, recipe)
    assert cost is not None
    rows = size * branches(files.denoiser, recipe.sampling)
    replay()
    trained = best(replay)
    decoding = decoder_cost(files, picture_size(files, recipe.sampling))[0] * size
    return {
        "forward": cost.operations * rows * STEPS / drawing,
        "training": cost.operations * rows * len(rollout.steps) / trained,
        "decoding": max(decoding / max(whole - drawing, 1e-3), 1.0),
    }


def best(work: Callable[[], Any], rounds: int = 2) -> float:
    """Seconds of the fastest of some rounds: what else runs on a machine only ever adds.

    On one thread of a processor they are processor time, which leaves that out altogether.
    """
    import torch

    alone = not torch.cuda.is_available() and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    found = []
    for _ in range(rounds):
        _settle(torch)
        start = clock()
        work()
        _settle(torch)
        found.append(clock() - start)
    return min(found)


def _settle(torch: Any) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
