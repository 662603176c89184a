"""Algorithms by name. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Callable

from ..plugins import Registry
from .settings import AlgorithmSettings, check_release, check_tdm, check_tdm_r1

ALGORITHMS = Registry(
    "algorithm",
    {
        "tdm_r1": "tdm_r1.algorithms.tdm_r1:TDMR1",
        "tdm_r1_release": "tdm_r1.algorithms.tdm_r1_release:TDMR1Release",
        "tdm": "tdm_r1.algorithms.tdm:TDM",
    },
)
CHECKS: dict[str, Callable[[AlgorithmSettings], None]] = {
    "tdm": check_tdm,
    "tdm_r1": check_tdm_r1,
    "tdm_r1_release": check_release,
}
