"""A diffusers pipeline small enough to train in a second: a two-layer denoiser on 4x4 grey pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import Tensor, nn


class ToyDenoiser(ModelMixin, ConfigMixin):
    """ε̂ from latents, time and prompt."""

    @register_to_config
    def __init__(self, width: int = 16, dropout: float = 0.0):
        super().__init__()
        self.first = nn.Linear(16 + 2, width)
        self.drop = nn.Dropout(dropout)
        self.second = nn.Linear(width, 16)

    def forward(self, sample: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        condition = condition.to(sample.dtype)
        time = torch.full_like(condition, float(timestep) / 1000)
        hidden = self.first(torch.cat([sample.flatten(1), time[:, None], condition[:, None]], 1)).tanh()
        return self.second(self.drop(hidden)).view_as(sample)


class ToyPipeline(DiffusionPipeline):
    """Prompt to picture, as diffusers' own pipelines do it: encode, denoise, decode."""

    def __init__(self, denoiser: Any, scheduler: Any):
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler)

    def encode_prompt(self, prompt: Sequence[str]) -> Tensor:
        return torch.tensor([hashlib.sha256(text.encode()).digest()[0] / 255 for text in prompt])

    def draw(self, count: int, generator: Any) -> Tensor:
        sources = generator if isinstance(generator, list) else [generator]
        return torch.cat([torch.randn(1, 1, 4, 4, generator=source) for source in sources])[:count]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_inference_steps: int = 4,
        generator: Any = None,
        output_type: str = "pil",
    ) -> Any:
        texts = [prompt] if isinstance(prompt, str) else prompt
        condition = self.encode_prompt(texts)
        self.scheduler.set_timesteps(num_inference_steps)
        latents = self.draw(len(texts), generator).to(self.denoiser.dtype)
        for t in self.scheduler.timesteps:
            latents = self.scheduler.step(self.denoise(latents, t, condition), t, latents).prev_sample
        decoded = self.decode(latents.float())
        if output_type == "pt":
            return (decoded[:, None],)
        pixels = decoded.numpy()
        return (pixels if output_type == "np" else [Image.fromarray(np.uint8(p * 255)) for p in pixels],)

    def denoise(self, latents: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return self.denoiser(latents, t, condition)

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, 0].clamp(-3, 3) / 6 + 0.5


def ddim() -> Any:
    """DDIM as Stable Diffusion ships it."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def toy(kind: type[ToyPipeline] = ToyPipeline, dropout: float = 0.0) -> Any:
    """The pipeline, with the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(ToyDenoiser(dropout=dropout).eval(), ddim())


def flow_toy(kind: type[ToyPipeline] = ToyPipeline) -> Any:
    """The same denoiser, understood as the velocity of a rectified flow."""
    pipe = toy(kind)
    pipe.register_modules(scheduler=FlowMatchEulerDiscreteScheduler())
    return pipe


def brightness(images: Sequence[Any], prompts: Sequence[str], metadata: Sequence[Any]) -> list[float]:
    """The mean grey value of each picture, 0 to 255."""
    return [float(np.asarray(image, dtype=np.float64).mean()) for image in images]


def glow(pictures: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
    """The same of tensors (B, C, H, W) in [0, 1], with a gradient."""
    return 255 * pictures.mean((1, 2, 3))


glow.differentiable = True  # type: ignore[attr-defined]
