"""Trains the gold judge on freshly drawn scenes, clean, noisy, blurred and passed through an autoencoder.

python -m tiller.emoji.train_judge OUTPUT.safetensors [--steps 3000] [--pipeline FOLDER]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiller.emoji import scenes
from tiller.emoji.judge import CLASSES, Judge, as_tensor, truth
from tiller.emoji.words import ACTIVITIES, UNSEEN_ACTIVITIES

KINDS = ("alone", "activity", "count", "count", "size", "place", *("relation",) * 6)
UNKNOWN = -100  # cross_entropy passes over it


def drawn(rng: np.random.Generator, count: int) -> tuple[Tensor, dict[str, Tensor], list[scenes.Scene]]:
    """Pictures (N, 3, 64, 64) in [-1, 1], their labels {fact: (N,)}, and their scenes."""
    everything = ACTIVITIES + UNSEEN_ACTIVITIES
    chosen = [scenes.sample(rng, str(rng.choice(KINDS)), everything) for _ in range(count)]
    truths = [truth(scene) for scene in chosen]
    labels = {fact: torch.tensor([t.get(fact, UNKNOWN) for t in truths]) for fact in CLASSES}
    return as_tensor([scenes.draw(scene) for scene in chosen]), labels, chosen


def spoil(pictures: Tensor, rng: np.random.Generator, vae: AutoencoderKL | None) -> Tensor:
    """Blurs some, passes some through the autoencoder with noisy latents, adds noise to some; (N, 3, 64, 64)."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    fate = torch.from_numpy(rng.random(len(pictures)))
    out = pictures.clone()
    blurred = fate < 0.25
    small = F.interpolate(out[blurred], size=int(rng.integers(24, 56)), mode="bilinear", antialias=True)
    out[blurred] = F.interpolate(small, size=64, mode="bilinear")
    coded = (fate > 0.85) if vae is not None else torch.zeros_like(blurred)
    if vae is not None and coded.any():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(out[coded]).latent_dist.mean.float()
            latents += 0.4 * rng.random() * torch.randn(latents.shape, generator=generator)
            out[coded] = vae.decode(latents).sample.float().clamp(-1, 1)
    level = torch.from_numpy(rng.random(len(out)) * (rng.random(len(out)) < 0.5) * 0.25).float()
    return (out + level[:, None, None, None] * torch.randn(out.shape, generator=generator)).clamp(-1, 1)


def train(
    judge: Judge,
    steps: int,
    batch: int = 32,
    lr: float = 2e-3,
    seed: int = 0,
    vae: AutoencoderKL | None = None,
) -> Iterator[tuple[int, float]]:
    """AdamW, one-cycle learning rate, bf16; yields (step, loss)."""
    judge.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch knows it, its stubs do not
    optimiser = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=0.02, fused=True)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        rng = np.random.default_rng((seed, step))
        pictures, labels, _ = drawn(rng, batch)
        pictures = spoil(pictures, rng, vae)
        with torch.autocast("cpu", torch.bfloat16):
            read = judge(pictures.contiguous(memory_format=torch.channels_last))
        known = [fact for fact in CLASSES if (labels[fact] != UNKNOWN).any()]
        loss = sum((F.nll_loss(read[f], labels[f], ignore_index=UNKNOWN) for f in known), torch.zeros(()))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        cycle.step()
        yield step, loss.item()


@torch.inference_mode()
def accuracy(
    judge: Judge, count: int, seed: int, noise: float = 0.0, blur: int = 64, vae: AutoencoderKL | None = None
) -> dict[str, float]:
    """Share of right facts on fresh scenes, with noise (standard deviation on [-1, 1]) or blur (down to that size)."""
    pictures, labels, _ = drawn(np.random.default_rng((seed, 10**6)), count)
    if vae is not None:
        pictures = vae.decode(vae.encode(pictures).latent_dist.mean).sample.clamp(-1, 1)
    if blur < 64:
        small = F.interpolate(pictures, size=blur, mode="bilinear", antialias=True)
        pictures = F.interpolate(small, size=64, mode="bilinear")
    pictures = pictures + noise * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(seed))
    read = judge.eval()(pictures.clamp(-1, 1))
    known = {fact: labels[fact] != UNKNOWN for fact in CLASSES}
    return {f: (read[f].argmax(-1) == labels[f])[known[f]].float().mean().item() for f in CLASSES}


def main() -> None:
    """Trains, measures, writes fp16 safetensors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--pipeline", type=Path, help="a pipeline folder whose autoencoder blurs some pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--start", type=Path, help="weights to go on from; those of other shapes are passed over")
    options = parser.parse_args()
    vae = AutoencoderKL.from_pretrained(options.pipeline / "vae").float() if options.pipeline else None
    torch.manual_seed(0)
    judge = Judge()
    if options.start:
        judge.load_state_dict({n: t.float() for n, t in load_file(options.start).items()}, strict=False)
    for step, loss in train(judge, options.steps, lr=options.lr, seed=options.seed, vae=vae):
        if step % 100 == 0:
            print(f"{step}/{options.steps}  loss {loss:.3f}", flush=True)
    for name, spoiled in {"clean": {}, "noise 0.2": {"noise": 0.2}, "blur to 32": {"blur": 32}}.items():
        print(name, {k: round(v, 4) for k, v in accuracy(judge, 1000, 1, **spoiled).items()}, flush=True)  # type: ignore[arg-type]
    if vae is not None:
        print("autoencoder", {k: round(v, 4) for k, v in accuracy(judge, 1000, 1, vae=vae).items()}, flush=True)
    state = {n: (t.half() if t.is_floating_point() else t).contiguous() for n, t in judge.state_dict().items()}
    save_file(state, options.output)


if __name__ == "__main__":
    main()
