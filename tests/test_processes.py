"""Several processes (gloo, on CPUs) make the same updates as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from processes_world import CASES, trained

TESTS = Path(__file__).parent
LIMIT = 300  # seconds


def launch(processes: int, *command: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A command under torchrun."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    return subprocess.run(
        [*torchrun, *command], env=environment, cwd=folder, timeout=LIMIT, capture_output=True, text=True
    )


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What so many processes have computed, a file for each case."""
    folder = tmp_path_factory.mktemp(f"processes_{request.param}")
    done = launch(request.param, str(TESTS / "processes_world.py"), str(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def alone() -> dict:
    return {}


@pytest.mark.parametrize("case", CASES)
def test_processes_make_the_update_of_one(case: str, results: Path, alone: dict):
    if case not in alone:
        alone[case] = trained(case)
    weights, metrics = alone[case]
    found = json.loads((results / f"{case}.json").read_text())
    assert found["weights"].keys() == weights.keys()
    for name, p in weights.items():
        torch.testing.assert_close(torch.tensor(found["weights"][name]), p, atol=1e-5, rtol=1e-5)
    assert found["metrics"].keys() == metrics.keys()
    for name, value in metrics.items():
        assert found["metrics"][name] == pytest.approx(value, rel=1e-3, abs=1e-5, nan_ok=True), name
