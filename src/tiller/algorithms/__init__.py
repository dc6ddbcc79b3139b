"""One file per algorithm; the difference between two files is the difference between two papers."""

from tiller.algorithms.align_prop import AlignProp
from tiller.algorithms.base import Algorithm, RewardGradient
from tiller.algorithms.dance_grpo import DanceGRPO
from tiller.algorithms.ddpo import DDPO
from tiller.algorithms.ddpo_sf import DDPOSF
from tiller.algorithms.draft import DRaFT
from tiller.algorithms.draft_lv import DRaFTLV
from tiller.algorithms.flow_grpo import FlowGRPO
from tiller.algorithms.flow_grpo_fast import FlowGRPOFast
from tiller.algorithms.mix_grpo import MixGRPO
from tiller.algorithms.refl import ReFL
from tiller.algorithms.rwr import RWR
from tiller.algorithms.rwr_sparse import RWRSparse
from tiller.algorithms.sft import SFT

__all__ = [
    "DDPO",
    "DDPOSF",
    "RWR",
    "SFT",
    "Algorithm",
    "AlignProp",
    "DRaFT",
    "DRaFTLV",
    "DanceGRPO",
    "FlowGRPO",
    "FlowGRPOFast",
    "MixGRPO",
    "RWRSparse",
    "ReFL",
    "RewardGradient",
]
