"""The forward process along a rollout: its clean latents noised again to the points its steps stood at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tiller.policy.noise import key, standard_normal
from tiller.policy.rollout import Rollout, Step
from tiller.process import Stage
from tiller.types import PipelineError


class ForwardProcess:
    """x_t = α·x0 + σ·ε at a rollout's steps, with noise that is a function of (key, step, prompt, sample).

    Args:
        rollout: its last latents are x0; its stages say what α and σ are.
        fresh: what makes this noise another than the last; the initial noise of the walk is keyed by it too.
        samples: what keys each row's noise, (B,); rows of one prompt with equal numbers get the same noise.
    """

    def __init__(self, rollout: Rollout, fresh: int, samples: Sequence[int] | None = None):
        self.rollout, self.fresh = rollout, fresh
        self.samples = tuple(samples) if samples is not None else rollout.samples
        self.clean = rollout.latents[-1].float()

    def __call__(self, index: int) -> Tensor:
        """(B, ...) the latents at step `index`."""
        return self.stage(index).noised(self.clean, self.noise(index))

    def noise(self, index: int) -> Tensor:
        """(B, ...) ε of step `index`, float32."""
        keys = zip(self.rollout.prompts, self.samples, strict=True)
        sources = [
            torch.Generator("cpu").manual_seed(key("forward", self.fresh, index, prompt, sample))
            for prompt, sample in keys
        ]
        return standard_normal(self.clean, sources)

    def stage(self, index: int) -> Stage:
        """Where step `index` stands on the noise process."""
        stage = self.rollout.records[index].stage
        if stage is None:
            raise PipelineError(
                "the scheduler of this pipeline is of no family whose forward process tiller knows; put another one "
                "into the pipeline, for example DDIMScheduler or FlowMatchEulerDiscreteScheduler."
            )
        return stage

    def explain(self, step: Step) -> Step:
        """The same step with its x0 and its ε, which `step.target` is made of.

        At the first step the pipeline starts from noise of its own; ε is then what is left of it without x0.
        """
        stage = self.stage(step.index)
        step.stage, step.clean = stage, self.clean.to(step.sample.device)
        if step.index:
            step.noise = self.noise(step.index).to(step.sample.device)
        else:
            step.noise = (step.sample - stage.now.alpha * step.clean) / stage.now.sigma
        return step
