"""What tiller adds to the denoiser: a sampling and a training step against bare calls of the same denoiser.

    python bench/overhead.py --model sd15 --latents 16 --batch 1
    python bench/overhead.py --model embedded --batch 64
    python bench/overhead.py --model embedded --batch 32 --steps 10 --algorithm ddpo mix_grpo sft rwr nft awm

The bare calls have the same batch shape, guidance's doubled batch included, and there are as many of them as an update
makes: with a graph, without one for the copies of the weights that an algorithm keeps, and with the adapters off for
the reference. The training side adds what a training step is made of: the pipeline's own loop, log-probabilities or
denoising errors, loss, backward, clipped gradients and the optimiser.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from models import PROMPTS, pipeline
from timing import interleaved, one_thread

from tiller import Policy, TrainConfig, TrainState, config
from tiller.algorithms.base import Algorithm
from tiller.collect import Batch, noise_window, windowed
from tiller.distributed import World
from tiller.policy import Rollout, Step, layout
from tiller.policy.seam import attribute
from tiller.recipe import ALGORITHMS
from tiller.types import Prompt, Scores
from tiller.update import update
from tiller.walks import Chunk

SETTINGS: dict[str, dict[str, Any]] = {"mix_grpo": {"window_size": 2}}  # where they are not the defaults
GROUP = 4


@dataclass
class Calls:
    """Denoiser calls of one update."""

    graph: int = 0  # with a graph, and with a backward pass
    copies: int = 0  # without: of other weights
    reference: int = 0  # without, and with the adapters off

    def __str__(self) -> str:
        return f"{self.graph} with a graph, {self.copies} of copies, {self.reference} of the reference"


class Workload:
    """One policy, one recorded batch, and the bare denoiser calls that it costs."""

    def __init__(self, policy: Policy, name: str, chosen: argparse.Namespace):
        self.policy, self.batch = policy, chosen.batch
        built: Any = config.build(ALGORITHMS.pick(name, **SETTINGS.get(name, {})))
        self.algorithm: Algorithm = replace(built, inner_epochs=1)
        self.prompts = [PROMPTS[index // GROUP % len(PROMPTS)] for index in range(self.batch)]
        self.config = TrainConfig(samples_per_epoch=self.batch, batch_size=self.batch, group_size=1, learning_rate=1e-6)
        self.state = TrainState(policy, self.config, self.algorithm)
        self.call = {"num_inference_steps": chosen.steps, "guidance_scale": 5.0, "output_type": "latent"}
        self.window = noise_window(policy, self.algorithm, self.call, 0, 0)
        self.arguments: tuple[Any, dict[str, Any]] = ((), {})
        self.rollout = self._recorded()
        self.calls = self._counted()

    def sample(self) -> Rollout:
        """The pipeline up to its latents, recorded."""
        kernel = windowed(self.algorithm.kernel, self.window)
        with self.state.using(self.algorithm.sampled_with):
            return self.policy.sample(self.prompts, kernel=kernel, keep_means=self.algorithm.keeps_means, **self.call)

    def train(self) -> None:
        """One update of the optimiser over the trained steps of the recorded batch, as the training loop makes it."""
        advantages = np.linspace(-1, 1, self.batch) if self.batch > 1 else np.ones(1)
        chunk = Chunk(0, self.rollout, np.arange(self.batch) // GROUP, [Prompt(text) for text in self.prompts])
        batch = Batch([chunk], self.prompts, Scores(advantages), advantages, [], self.window)
        update(self.policy, batch, self.algorithm, self.config, self.state, World())

    def bare_forward(self) -> None:
        """As many denoiser calls as a rollout makes, without a graph."""
        with torch.no_grad(), self._autocast():
            for _ in self.rollout.records:
                self._bare()

    def bare_training(self) -> None:
        """As many denoiser calls as an update makes, with their backward passes."""
        with self._autocast():
            with torch.no_grad():
                for _ in range(self.calls.copies):
                    self._bare()
                with self.policy.base():
                    for _ in range(self.calls.reference):
                        self._bare()
            for _ in range(self.calls.graph):
                self._bare().float().square().mean().backward()
        self.state.optimizer.zero_grad(set_to_none=True)

    def outside(self, work: Callable[[], object]) -> float:
        """The time of `work` outside the denoiser's forwards and the backward passes, as a share of theirs."""
        inside = [0.0]

        def timed(function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                start = time.process_time()
                answer = function(*args, **kwargs)
                inside[0] += time.process_time() - start
                return answer

            return run

        with ExitStack() as stack:
            unet = self.policy.pipe.unet
            stack.enter_context(attribute(unet, "forward", timed(unet.forward)))
            stack.enter_context(attribute(Step, "backward", timed(Step.backward)))
            start = time.process_time()
            work()
            total = time.process_time() - start
        return total / inside[0] - 1

    def _recorded(self) -> Rollout:
        unet = self.policy.pipe.unet
        forward = unet.forward

        def noted(*args: Any, **kwargs: Any) -> Any:
            self.arguments = (args, kwargs)
            return forward(*args, **kwargs)

        with attribute(unet, "forward", noted):
            return self.sample()

    def _counted(self) -> Calls:
        """The denoiser calls of an update, by making one."""
        unet, found = self.policy.pipe.unet, Calls()
        forward, base = unet.forward, [False]
        using = self.state.using

        def counted(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                found.graph += 1
            elif base[0]:
                found.reference += 1
            else:
                found.copies += 1
            return forward(*args, **kwargs)

        def watched(name: str) -> Any:
            base[0] = name == "reference"
            return using(name)

        with attribute(unet, "forward", counted), attribute(self.state, "using", watched):
            self.train()
        return found

    def _bare(self) -> torch.Tensor:
        args, kwargs = self.arguments
        return self.policy.pipe.unet(*args, **kwargs)[0]

    def _autocast(self) -> Any:
        enabled = self.policy.mixed_precision != "no"
        return torch.autocast(self.policy.pipe.device.type, dtype=torch.bfloat16, enabled=enabled)


def policy(chosen: argparse.Namespace) -> Policy:
    """The model with its adapters, laid out as `tiller train` does: on both sides of every ratio."""
    pipe = pipeline(chosen.model, chosen.latents).to("cuda" if torch.cuda.is_available() else "cpu")
    loaded = Policy(pipe, lora_rank=None if chosen.full else chosen.rank, mixed_precision=chosen.precision)
    layout.plain_attention(pipe.unet, chosen.precision == "bf16")
    if not chosen.no_channels_last:
        layout.channels_last(pipe.unet)
    return loaded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["sd15", "embedded", "small"], default="embedded")
    parser.add_argument("--algorithm", nargs="+", default=["ddpo"], help="by their names in a recipe")
    parser.add_argument("--latents", type=int, help="side of the latents")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5, help="denoising steps")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=["sampling", "training"], help="measure one of the two")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--full", action="store_true", help="train all weights in place of a LoRA")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--no-channels-last", action="store_true")
    chosen = parser.parse_args()
    one_thread()
    driven = policy(chosen)
    weights = sum(p.numel() for p in driven.pipe.unet.parameters()) / 1e6
    trained = sum(p.numel() for p in driven.parameters.values()) / 1e6
    print(f"{chosen.model}: {weights:.0f} M weights in the denoiser, {trained:.1f} M trained", flush=True)
    for name in chosen.algorithm:
        work = Workload(driven, name, chosen)
        print(f"{name}, latents {tuple(work.rollout.latents[0].shape)}; an update's calls: {work.calls}", flush=True)
        if chosen.only != "training":
            print("  sampling, tiller / bare:", interleaved(work.sample, work.bare_forward, chosen.rounds), flush=True)
            print(f"    outside the denoiser: {work.outside(work.sample):.2%}", flush=True)
        if chosen.only != "sampling":
            print("  training, tiller / bare:", interleaved(work.train, work.bare_training, chosen.rounds), flush=True)
            print(f"    outside forward and backward: {work.outside(work.train):.2%}", flush=True)


if __name__ == "__main__":
    main()
