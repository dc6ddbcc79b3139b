"""The memory of an update against the number of denoising steps: that of one step's graph, whatever their number.

    python bench/memory.py                                   # what the graph holds, counted by tensor, on any machine
    python bench/memory.py --sd15 --steps 50 --batch 1       # on a GPU: Stable Diffusion 1.5's true shape at 512x512

The first form counts the bytes that autograd has saved and not yet freed, at their highest. The second form, with bf16
weights, a float32 LoRA and gradient checkpointing, prints the peak of allocated memory and images per second, against
bare calls of the same denoiser.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from models import PROMPTS, pipeline
from timing import one_thread
from torch import Tensor

from tiller import Policy, Rollout, Step, TrainConfig, TrainState
from tiller.policy import layout


class Ledger:
    """Bytes of storages that autograd holds for a backward pass: now, and at most."""

    def __init__(self, weights: set[int]):
        self.weights = weights  # storages that are there anyway
        self.holders: dict[int, int] = {}
        self.now = self.peak = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Every tensor saved for a backward pass within the block is counted until it is let go."""
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: Held(tensor, self), lambda held: held.tensor):
            yield


class Held:
    """A saved tensor; storages that several of them share are counted once."""

    def __init__(self, tensor: Tensor, ledger: Ledger):
        self.tensor, self.ledger = tensor, ledger
        storage = tensor.untyped_storage()
        self.key, self.bytes = storage.data_ptr(), storage.nbytes()
        if self.key in ledger.weights:
            self.bytes = 0
        count = ledger.holders.get(self.key, 0)
        ledger.holders[self.key] = count + 1
        if not count:
            ledger.now += self.bytes
            ledger.peak = max(ledger.peak, ledger.now)

    def __del__(self) -> None:
        self.ledger.holders[self.key] -= 1
        if not self.ledger.holders[self.key]:
            self.ledger.now -= self.bytes


def backward(step: Step) -> None:
    """DDPO's gradient at advantage 1."""
    assert step.old_log_prob is not None
    step.backward(-(step.log_prob - step.old_log_prob).exp().sum())


class Keeper(list[Tensor]):
    """What a loop does that sums its loss over the steps: every step's graph is kept."""

    def __call__(self, step: Step) -> None:
        self.append(step.log_prob)


def graph_sizes(chosen: argparse.Namespace) -> None:
    """Peak of the saved bytes of an update, for several numbers of steps, against one bare call."""
    pipe = pipeline("small", chosen.latents).to(torch.bfloat16 if chosen.bf16_weights else torch.float32)
    policy = Policy(pipe, mixed_precision=chosen.precision)
    if chosen.cast_once:
        layout.cast_once(pipe.unet)
    owned = {p.untyped_storage().data_ptr() for p in policy.pipe.unet.parameters()}
    prompts = list(PROMPTS[: chosen.batch])
    alone = 0
    print("steps   an update as tiller makes it   one backward pass at the end, for comparison")
    for count in (1, *chosen.counts):
        rollout = policy.sample(prompts, num_inference_steps=count, output_type="latent")
        step_by_step = held_at_most(policy, rollout, backward, owned)
        alone = alone or step_by_step
        at_the_end = held_at_most(policy, rollout, Keeper(), owned)
        shown = (f"{size / 2**20:9.2f} MiB ({size / alone:5.2f} x one step)" for size in (step_by_step, at_the_end))
        print(f"{count:>5}  " + "   ".join(shown), flush=True)


def held_at_most(policy: Policy, rollout: Rollout, on_step: Callable[[Step], None], owned: set[int]) -> int:
    """Bytes that autograd holds at most during a replay, besides the weights."""
    ledger = Ledger(owned)
    with ledger.watching():
        policy.replay(rollout, on_step)
    return ledger.peak


def sd15_on_gpu(chosen: argparse.Namespace) -> None:
    """Peak memory and images per second of LoRA training at 512x512, against bare denoiser calls."""
    pipe = pipeline("sd15-full").to("cuda", torch.bfloat16)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.unet.enable_gradient_checkpointing()
    policy = Policy(pipe, lora_rank=16, mixed_precision="bf16")
    state = TrainState(policy, config := TrainConfig())
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(chosen.batch)]
    call = {"num_inference_steps": chosen.steps, "guidance_scale": 5.0}
    rollout = policy.sample(prompts, **{**call, "num_inference_steps": 2})  # warms up
    policy.replay(rollout, backward)
    _aside(pipe, "cpu" if chosen.offload else "cuda")

    def train() -> None:
        _aside(pipe, "cuda")
        drawn = policy.sample(prompts, **call)
        _aside(pipe, "cpu" if chosen.offload else "cuda")
        policy.replay(drawn, backward)
        state.step(config)

    bare = bare_calls(policy, rollout, chosen.steps)
    for name, work in (("bare", bare), ("tiller", train), ("bare", bare), ("tiller", train)):
        seconds, peak = measured(work)
        print(f"{name:>6}: {chosen.batch / seconds:.3f} images/s, peak {peak / 1e9:.2f} GB")


def bare_calls(policy: Policy, rollout: Rollout, steps: int) -> Callable[[], None]:
    """As many denoiser calls as a round of sampling and training: half without a graph, half with one."""
    latents = torch.cat([rollout.latents[0]] * 2)
    text = torch.zeros(len(latents), 77, 768, device=latents.device, dtype=latents.dtype)

    def call() -> Tensor:
        return policy.pipe.unet(latents, 500, encoder_hidden_states=text).sample

    def work() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            for _ in range(steps):
                with torch.no_grad():
                    call()
            torch.clear_autocast_cache()
            for _ in range(steps):
                call().float().square().mean().backward()
        for parameter in policy.parameters.values():
            parameter.grad = None

    return work


def measured(work: Callable[[], None]) -> tuple[float, int]:
    """Seconds, and the peak of allocated bytes."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated()


def _aside(pipe: Any, device: str) -> None:
    """Text encoder and autoencoder, which training does not need, on another device."""
    pipe.vae.to(device)
    pipe.text_encoder.to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 5, 20])
    parser.add_argument("--latents", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", choices=["no", "bf16"], default="no", help="autocast")
    parser.add_argument("--bf16-weights", action="store_true", help="frozen weights in bfloat16")
    parser.add_argument(
        "--cast-once", action="store_true", help="frozen matrices in bfloat16, as `tiller train` has them"
    )
    parser.add_argument("--sd15", action="store_true", help="Stable Diffusion 1.5's size, on a GPU")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--offload", action="store_true", help="text encoder and autoencoder off the GPU in training")
    chosen = parser.parse_args()
    one_thread()
    if not chosen.sd15:
        graph_sizes(chosen)
    elif torch.cuda.is_available():
        sd15_on_gpu(chosen)
    else:
        raise SystemExit("--sd15 needs a GPU, and there is none here; leave it out to count what the graph holds.")


if __name__ == "__main__":
    main()
