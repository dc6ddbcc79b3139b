"""A recipe: everything a run is made of, as plain data. Reading one imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tiller.choice import Choice, Chosen
from tiller.reward_spec import RewardSetting, check_share, read, read_reported
from tiller.settings import MonitorRules, TrainConfig
from tiller.types import ConfigError

ALGORITHMS = Choice(
    {
        "ddpo": "tiller.algorithms.ddpo:DDPO",
        "ddpo_sf": "tiller.algorithms.ddpo_sf:DDPOSF",
        "rwr": "tiller.algorithms.rwr:RWR",
        "rwr_sparse": "tiller.algorithms.rwr_sparse:RWRSparse",
        "sft": "tiller.algorithms.sft:SFT",
        "flow_grpo": "tiller.algorithms.flow_grpo:FlowGRPO",
        "flow_grpo_fast": "tiller.algorithms.flow_grpo_fast:FlowGRPOFast",
        "dance_grpo": "tiller.algorithms.dance_grpo:DanceGRPO",
        "mix_grpo": "tiller.algorithms.mix_grpo:MixGRPO",
        "draft": "tiller.algorithms.draft:DRaFT",
        "draft_lv": "tiller.algorithms.draft_lv:DRaFTLV",
        "align_prop": "tiller.algorithms.align_prop:AlignProp",
        "refl": "tiller.algorithms.refl:ReFL",
        "nft": "tiller.algorithms.nft:NFT",
        "awm": "tiller.algorithms.awm:AWM",
        "dgpo": "tiller.algorithms.dgpo:DGPO",
        "crd": "tiller.algorithms.crd:CRD",
        "dpo": "tiller.algorithms.dpo:DiffusionDPO",
        "d3po": "tiller.algorithms.d3po:D3PO",
        "dpok": "tiller.algorithms.dpok:DPOK",
        "lee": "tiller.algorithms.lee:Lee",
        "ppo": "tiller.algorithms.ppo:PPO",
        "adjoint_matching": "tiller.algorithms.adjoint_matching:AdjointMatching",
    }
)
"""What `algorithm:` may name."""

_DDPO = ALGORITHMS.pick("ddpo")

KERNELS = Choice(
    {
        "ddim": "tiller.kernels:DDIM",
        "ddpm": "tiller.kernels:DDPM",
        "flow_sde": "tiller.kernels:FlowSDE",
        "dance_sde": "tiller.kernels:DanceSDE",
        "cps": "tiller.kernels:CPS",
        "ode": "tiller.kernels:ODE",
    }
)
"""What `kernel:` may name."""


@dataclass(frozen=True)
class Model:
    """The pipeline to train, and which of its weights."""

    name: str = "emoji"  # or emoji-flow: the models that come with the package; a folder; a name on the hub
    revision: str | None = None
    variant: str | None = None  # such as fp16: which of a repository's weight files
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the weights as loaded
    mixed_precision: Literal["no", "bf16"] = "no"  # autocast of the models; transitions stay in float32
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    lora_rank: int | None = 16  # None fine-tunes all weights of the denoiser
    lora_alpha: float | None = None  # None is the rank, so that the adapter's scale is 1
    target_modules: tuple[str, ...] | None = None  # layers that get an adapter; None finds them
    gradient_checkpointing: bool = False
    channels_last: bool = True  # of a U-Net's convolutions
    compile: bool = False

    def __post_init__(self) -> None:
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ConfigError(f"lora_rank is {self.lora_rank}; it must be at least 1, or null for full fine-tuning.")


@dataclass(frozen=True)
class Evaluation:
    """How base and tuned model are compared: the same prompts and the same initial noise for both."""

    every: int = 10  # epochs between evaluations during the run; 0 evaluates at the start and the end only
    pictures: int = 16  # of every split that are looked at during the run
    features: str | None = None  # a CLIP or another image encoder for distances between pictures; None: 16x16 pixels
    samples_per_prompt: int = 4  # at the start and the end
    rewards: RewardSetting = ()  # scores to report beside the trained one
    sampling: dict[str, Any] = field(default_factory=dict)  # call arguments that differ from training's
    monitor: MonitorRules = field(default_factory=MonitorRules)  # what is done about over-optimisation

    def __post_init__(self) -> None:
        if self.every < 0 or min(self.samples_per_prompt, self.pictures) < 1:
            raise ConfigError("every cannot be negative, and samples_per_prompt and pictures must be at least 1.")
        read_reported(self.rewards)


@dataclass(frozen=True)
class RunSettings:
    """The run folder."""

    output_dir: str | None = None  # None makes one under runs/, named after the recipe
    checkpoint_every: int = 5  # epochs
    keep_last: int = 2  # checkpoints
    reward_timeout: float | None = 600.0  # seconds for 32 pictures, and in proportion for more; null waits for ever
    max_missing: float = 0.5  # the share of an epoch's scores that may be missing before the run stops; 1 never stops
    report_to: tuple[str, ...] = ()  # tensorboard, wandb, trackio; metrics.jsonl is always written
    sample_prompts: int = 8  # pictures in the sheet that shows the run's progress

    def __post_init__(self) -> None:
        if min(self.checkpoint_every, self.keep_last) < 1 or self.sample_prompts < 0:
            raise ConfigError("checkpoint_every and keep_last must be at least 1, and sample_prompts at least 0.")
        if self.reward_timeout is not None and self.reward_timeout <= 0:
            raise ConfigError(f"reward_timeout is {self.reward_timeout}; it must be more than 0 seconds, or null.")
        check_share(self.max_missing)


@dataclass(frozen=True)
class Recipe:
    """One run. Every field has a default, so a recipe names only what it changes."""

    model: Model = field(default_factory=Model)
    prompts: str = "animals"  # a built-in set, a .txt or a .jsonl file
    held_out: str | None = None  # evaluate on the held-out splits of this set, or on this file; None: of `prompts`
    reward: RewardSetting | None = "jpeg_compressibility"  # {name, weight, ...} or a list, too; null: `data`
    data: str | None = None  # captioned pictures (a folder, or emoji), or preference pairs (a .jsonl) with reward: null
    algorithm: Annotated[Chosen, ALGORITHMS] = _DDPO
    kernel: Annotated[Chosen | None, KERNELS] = None  # None is the algorithm's own
    sampling: dict[str, Any] = field(default_factory=dict)  # the pipeline's call arguments, num_inference_steps ...
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: Evaluation = field(default_factory=Evaluation)
    run: RunSettings = field(default_factory=RunSettings)

    def __post_init__(self) -> None:
        read(self.reward)
