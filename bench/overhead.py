"""What tiller adds to the denoiser: a sampling and a training step against bare calls of the same denoiser.

    python bench/overhead.py --model sd15 --latents 16 --batch 1
    python bench/overhead.py --model embedded --batch 64

The bare calls have the same batch shape, guidance's doubled batch included; the training side adds what a training step
is made of: the pipeline's own loop, log-probabilities, loss, backward, clipped gradients and the optimiser.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from models import PROMPTS, pipeline
from timing import interleaved, one_thread

from tiller import DDPO, Policy, TrainConfig, TrainState
from tiller.distributed import World
from tiller.policy import Rollout, Step
from tiller.policy.seam import attribute
from tiller.training import Batch, update
from tiller.types import Scores


class Workload:
    """One policy, one recorded batch, and the bare denoiser calls that it costs."""

    def __init__(self, chosen: argparse.Namespace, weights: torch.dtype = torch.float32):
        pipe = pipeline(chosen.model, chosen.latents).to("cuda" if torch.cuda.is_available() else "cpu", weights)
        rank = None if chosen.full else chosen.rank
        self.policy = Policy(pipe, lora_rank=rank, mixed_precision=chosen.precision)
        if not chosen.no_channels_last:
            pipe.unet.to(memory_format=torch.channels_last)
        self.steps, self.batch = chosen.steps, chosen.batch
        self.prompts = [PROMPTS[index % len(PROMPTS)] for index in range(self.batch)]
        self.config = TrainConfig(samples_per_epoch=self.batch, batch_size=self.batch, group_size=1, learning_rate=1e-6)
        self.state = TrainState(self.policy, self.config)
        self.arguments: tuple[Any, dict[str, Any]] = ((), {})
        self.rollout = self._recorded()

    def sample(self) -> Rollout:
        """The pipeline up to its latents, recorded."""
        return self.policy.sample(
            self.prompts, num_inference_steps=self.steps, guidance_scale=5.0, output_type="latent"
        )

    def train(self) -> None:
        """One update of the optimiser over all steps of the recorded batch, as the training loop makes it."""
        advantages = np.linspace(-1, 1, self.batch) if self.batch > 1 else np.ones(1)
        batch = Batch([self.rollout], self.prompts, Scores(advantages), advantages, [])
        update(self.policy, batch, DDPO(), self.config, self.state, World())

    def bare_forward(self) -> None:
        """As many denoiser calls, without a graph."""
        with torch.no_grad(), self._autocast():
            for _ in range(self.steps):
                self._call()

    def bare_training(self) -> None:
        """As many denoiser calls, forward and backward."""
        with self._autocast():
            for _ in range(self.steps):
                self._call().float().square().mean().backward()
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

    def _call(self) -> torch.Tensor:
        args, kwargs = self.arguments
        return self.policy.pipe.unet(*args, **kwargs)[0]

    def _autocast(self) -> Any:
        enabled = self.policy.mixed_precision != "no"
        return torch.autocast(self.policy.pipe.device.type, dtype=torch.bfloat16, enabled=enabled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["sd15", "embedded", "small"], default="embedded")
    parser.add_argument("--latents", type=int, help="side of the latents")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5, help="denoising steps, all of them trained")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--full", action="store_true", help="train all weights in place of a LoRA")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--no-channels-last", action="store_true")
    chosen = parser.parse_args()
    one_thread()
    work = Workload(chosen)
    weights = sum(p.numel() for p in work.policy.pipe.unet.parameters()) / 1e6
    trained = sum(p.numel() for p in work.policy.parameters.values()) / 1e6
    shape = tuple(work.rollout.records[0].sample.shape)
    print(
        f"{chosen.model}: {weights:.0f} M weights in the denoiser, {trained:.1f} M trained, latents {shape}", flush=True
    )
    print("sampling, tiller / bare:", interleaved(work.sample, work.bare_forward, chosen.rounds), flush=True)
    print(f"  outside the denoiser: {work.outside(work.sample):.2%}", flush=True)
    print("training, tiller / bare:", interleaved(work.train, work.bare_training, chosen.rounds), flush=True)
    print(f"  outside forward and backward: {work.outside(work.train):.2%}")


if __name__ == "__main__":
    main()
