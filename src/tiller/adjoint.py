"""The lean adjoint: a reward's gradient, carried back along recorded paths through the model before training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tiller.policy import Policy, Rollout, Step
from tiller.rewards.gradient import score_with_graph


class LeanAdjoint:
    """ã of the states of one rollout (Domingo-Enrich et al. 2024, Adjoint Matching, 2409.08861, section 5.2).

    ã_T = -∇r(x_T),  ã_k = ã_{k+1} + ∇_x[ã_{k+1}·(mean(x_k) - x_k)] = (∂mean/∂x_k)ᵀ·ã_{k+1}

    for x_0 noise, x_T the clean latents, and the mean that the weights in force give; gradients of theirs are not
    taken. The graph of one step only is ever held, and each step costs one forward and one backward pass.
    """

    def __init__(
        self,
        policy: Policy,
        reward: Any,
        rollout: Rollout,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
    ):
        self.policy, self.rollout = policy, rollout
        clean = rollout.latents[-1].float().clone().requires_grad_()
        with torch.enable_grad():
            pictures = policy.unroll(rollout, len(rollout.records), state=clean)
            rewards = score_with_graph(reward, pictures, prompts, metadata)
        self.missing = ~rewards.detach().isfinite().to(clean.device)  # (B,) bool: these have no adjoint, and 0 here
        there = rewards[rewards.isfinite()]
        slope = torch.autograd.grad(there.sum(), clean)[0] if len(there) else torch.zeros_like(clean)
        self.states = {len(rollout.records): -slope}  # by k; (B, ...) float32

    def back_to(self, index: int, look: Callable[[Step], None] | None = None) -> None:
        """Carry ã back to state `index`, which is at least 1; `look` is shown each step that this takes."""
        for k in range(min(self.states) - 1, index - 1, -1):
            self.states[k] = self._carried(k, look)

    def _carried(self, index: int, look: Callable[[Step], None] | None) -> Tensor:
        """ã of state `index`, from that of the next one."""
        state = self.rollout.latents[index].float().clone().requires_grad_()
        found: list[Tensor] = []

        def on_step(step: Step) -> None:
            found.append(torch.autograd.grad(step.mean, state, self.states[index + 1].to(step.mean))[0])
            if look is not None:
                look(step)

        with torch.enable_grad():
            self.policy.predict(self.rollout, on_step, lambda _: state, [index])
        return found[0]
