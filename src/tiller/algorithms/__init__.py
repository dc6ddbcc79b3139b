"""One file per algorithm; the difference between two files is the difference between two papers."""

from tiller.algorithms.adjoint_matching import AdjointMatching
from tiller.algorithms.align_prop import AlignProp
from tiller.algorithms.awm import AWM
from tiller.algorithms.base import Algorithm, RewardGradient
from tiller.algorithms.crd import CRD
from tiller.algorithms.d3po import D3PO
from tiller.algorithms.dance_grpo import DanceGRPO
from tiller.algorithms.ddpo import DDPO
from tiller.algorithms.ddpo_sf import DDPOSF
from tiller.algorithms.dgpo import DGPO
from tiller.algorithms.dpo import DiffusionDPO
from tiller.algorithms.dpok import DPOK
from tiller.algorithms.draft import DRaFT
from tiller.algorithms.draft_lv import DRaFTLV
from tiller.algorithms.flow_grpo import FlowGRPO
from tiller.algorithms.flow_grpo_fast import FlowGRPOFast
from tiller.algorithms.lee import Lee
from tiller.algorithms.mix_grpo import MixGRPO
from tiller.algorithms.nft import NFT
from tiller.algorithms.ppo import PPO
from tiller.algorithms.refl import ReFL
from tiller.algorithms.rwr import RWR
from tiller.algorithms.rwr_sparse import RWRSparse
from tiller.algorithms.sft import SFT

__all__ = [
    "AWM",
    "CRD",
    "D3PO",
    "DDPO",
    "DDPOSF",
    "DGPO",
    "DPOK",
    "NFT",
    "PPO",
    "RWR",
    "SFT",
    "AdjointMatching",
    "Algorithm",
    "AlignProp",
    "DRaFT",
    "DRaFTLV",
    "DanceGRPO",
    "DiffusionDPO",
    "FlowGRPO",
    "FlowGRPOFast",
    "Lee",
    "MixGRPO",
    "RWRSparse",
    "ReFL",
    "RewardGradient",
]
