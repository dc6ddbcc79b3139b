"""The pipeline itself as the policy: record a call, replay it with gradients, save what was learned."""

from tiller.policy.policy import Policy
from tiller.policy.rollout import Record, Rollout, Step

__all__ = ["Policy", "Record", "Rollout", "Step"]
