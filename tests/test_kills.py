"""A few stops at random moments; `benchmarks/kills.py` has made many (docs/results/kills.md)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
KILLS = Path(__file__).parent.parent / "benchmarks" / "kills.py"


def test_a_run_that_is_killed_ends_as_one_that_is_left_alone(tmp_path: Path):
    out = tmp_path / "kills.json"
    args = ["--kills", "2", "--iterations", "24", "--out", str(out)]  # more than two kills leave time for
    subprocess.run([sys.executable, str(KILLS), *args], check=True, capture_output=True, text=True)
    (row,) = json.loads(out.read_text())
    assert len(row["kills"]) == 2
    assert row["different"] == []
