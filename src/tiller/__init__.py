"""Steer image generators with rewards: reinforcement learning for any diffusers pipeline.

    policy = tiller.Policy.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
    for report in tiller.train(policy, prompts, reward, tiller.DDPO(), config):
        print(report.metrics["reward/mean"])
    policy.save("my_lora")

The names below are loaded when they are first asked for, so that `import tiller` costs nothing.
"""

import importlib
from typing import Any

_HOMES = {
    "Policy": "tiller.policy",
    "Rollout": "tiller.policy",
    "Step": "tiller.policy",
    "train": "tiller.training",
    "Report": "tiller.training",
    "TrainConfig": "tiller.settings",
    "TrainState": "tiller.state",
    "Algorithm": "tiller.algorithms",
    "DDPO": "tiller.algorithms",
    "DDPOSF": "tiller.algorithms",
    "RWR": "tiller.algorithms",
    "RWRSparse": "tiller.algorithms",
    "SFT": "tiller.algorithms",
    "FlowGRPO": "tiller.algorithms",
    "FlowGRPOFast": "tiller.algorithms",
    "DanceGRPO": "tiller.algorithms",
    "MixGRPO": "tiller.algorithms",
    "DRaFT": "tiller.algorithms",
    "DRaFTLV": "tiller.algorithms",
    "AlignProp": "tiller.algorithms",
    "ReFL": "tiller.algorithms",
    "AdjointMatching": "tiller.algorithms",
    "NFT": "tiller.algorithms",
    "AWM": "tiller.algorithms",
    "DGPO": "tiller.algorithms",
    "CRD": "tiller.algorithms",
    "DiffusionDPO": "tiller.algorithms",
    "D3PO": "tiller.algorithms",
    "DPOK": "tiller.algorithms",
    "Lee": "tiller.algorithms",
    "PPO": "tiller.algorithms",
    "Prompt": "tiller.types",
    "Scores": "tiller.types",
    "TillerError": "tiller.types",
    "ConfigError": "tiller.types",
    "RewardError": "tiller.types",
    "PipelineError": "tiller.types",
    "RunError": "tiller.types",
}
_ROOMS = ("advantages", "algorithms", "evaluation", "kernels", "losses", "policy", "process", "prompts", "rewards")

__all__ = sorted([*_HOMES, *_ROOMS])


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _ROOMS:
        value = importlib.import_module(f"tiller.{name}")
    else:
        raise AttributeError(f"module 'tiller' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
