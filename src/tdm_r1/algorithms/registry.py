"""Algorithms by name. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Callable

from ..plugins import Registry
from .settings import AlgorithmSettings, check_direct, check_policy, check_release, check_tdm_alone, check_tdm_r1

ALGORITHMS = Registry(
    "algorithm",
    {
        "tdm_r1": "tdm_r1.algorithms.tdm_r1:TDMR1",
        "tdm_r1_release": "tdm_r1.algorithms.tdm_r1_release:TDMR1Release",
        "tdm": "tdm_r1.algorithms.tdm:TDM",
        "dgpo": "tdm_r1.algorithms.dgpo:DGPO",
        "flow_grpo": "tdm_r1.algorithms.flow_grpo:FlowGRPO",
        "nft": "tdm_r1.algorithms.nft:DiffusionNFT",
        "tdm_direct_rl": "tdm_r1.algorithms.tdm_direct_rl:TDMDirectRL",
    },
)
CHECKS: dict[str, Callable[[AlgorithmSettings], None]] = {
    "tdm": check_tdm_alone,
    "tdm_r1": check_tdm_r1,
    "tdm_r1_release": check_release,
    "dgpo": check_policy,
    "flow_grpo": check_policy,
    "nft": check_policy,
    "tdm_direct_rl": check_direct,
}
