"""Several processes (gloo, on CPUs) make the same updates as one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sharded_world
from processes_world import CASES, trained
from tdm_r1.train.checkpoint import DamagedError
from tdm_r1.train.run import Run

pytestmark = pytest.mark.slow

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


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have computed with frozen transformers that are spread over them."""
    folder = tmp_path_factory.mktemp("sharded")
    sharded_world.make(folder)
    done = launch(2, str(TESTS / "sharded_world.py"), str(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("case", sharded_world.CASES)
def test_a_transformer_spread_over_processes_gives_the_update_of_a_whole_one(case: str, sharded: Path):
    weights = sharded_world.trained(case, sharded, shard=False)
    found = load_file(sharded / f"{case}.safetensors")
    assert found.keys() == weights.keys()
    (one, every), (two, _) = found.pop("kept").tolist()
    assert weights.pop("kept").tolist() == [every, every]
    assert one + two == every
    assert max(one, two) < 0.65 * every
    for name, p in weights.items():
        torch.testing.assert_close(found[name], p, atol=1e-5, rtol=1e-5)


def test_a_run_whose_roles_are_spread_can_be_looked_at_and_gone_on_with_in_one_process(sharded: Path):
    """Two processes have trained it, evaluated it, gone on with it from a checkpoint, and exported it."""
    run = Run(sharded_world.fitted(sharded, shard=False))
    checkpoint = run.checkpoints()[-1]
    assert len(list(checkpoint.parent.glob("*.shares/*.safetensors"))) == 2 * len(run.checkpoints())
    run.load(checkpoint)
    for name, p in load_file(sharded / "fitted.safetensors").items():
        role, _, weight = name.partition("/")
        assert torch.equal(run.roles.weights(role)[weight], p), name
    exported = load_file(run.folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(exported[n], p) for n, p in run.roles.weights("generator_ema").items())
    metrics = run.evaluator()(run.few_step()).metrics
    assert log_of(run.folder)[-1]["eval/reward"] == pytest.approx(metrics["reward"], rel=1e-3)
    run.step()
    shares = next(checkpoint.parent.glob(f"{checkpoint.stem}.*.shares/*"))
    shares.write_bytes(shares.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedError, match="checksum"):
        run.load(checkpoint)
    checkpoint.unlink()  # as a run leaves it that is killed before a checkpoint is whole, and when it is written again
    (first,) = run.checkpoints()
    (checkpoint.parent / f"{first.stem}.0badcafe.shares").mkdir()
    with run.files.alone():
        assert not list(checkpoint.parent.glob(f"{checkpoint.stem}.*"))
        assert len(list(checkpoint.parent.glob("*.shares/*"))) == 2
        assert len(list(checkpoint.parent.glob("*.shares"))) == 1


SMALL = (
    "--batch.prompts=2",
    "--batch.group=3",
    "--batch.micro-batch=3",
    "--batch.kl-prompts=3",
    "--task.kl=mini",
    "--evaluation.prompts=5",
    "--evaluation.every=2",
    "--save-every=1",
    "--iterations=3",
    "--output=.",
)


def train(*more: str) -> tuple[str, ...]:
    return ("-m", "tdm_r1", "train", "mini", *SMALL, *more)


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def require_same_log(one: list[dict], two: list[dict]) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            if not name.startswith("seconds") and not name.endswith("images_per_second"):
                assert b[name] == pytest.approx(value, rel=2e-3, abs=2e-4), name


def test_a_run_of_two_processes_is_the_run_of_one_and_goes_on_in_another_number(tmp_path: Path):
    """By `accelerate launch`, then alone from its first checkpoint; half of the batches are scored while others are
    learned from."""
    stale = ("--scoring.staleness=1", "--save-every=2", "--iterations=4")
    accelerate = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*accelerate, *train("--name=two", *stale)], cwd=tmp_path, env=environment, check=True, timeout=LIMIT
    )
    alone = (sys.executable, *train("--name=one", *stale))
    subprocess.run(alone, cwd=tmp_path, env=environment, check=True, timeout=LIMIT)
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    require_same_log(one, two)
    assert (tmp_path / "two" / "lora").is_dir()
    (tmp_path / "two" / "exported.json").unlink()
    again = (sys.executable, *train("--name=two", *stale, "--resume", "--from=2"))
    subprocess.run(again, cwd=tmp_path, env=environment, check=True, timeout=LIMIT)
    require_same_log(one, log_of(tmp_path / "two"))


def test_torchrun_starts_a_run_again_from_its_last_checkpoint(tmp_path: Path):
    """A reward that kills its process at the second iteration, once; the run comes to its end all the same."""
    (tmp_path / "deadly.py").write_text(
        "import os, signal\n"
        "from pathlib import Path\n\n"
        "calls = 0\n\n"
        "def score(images, prompts, metadata):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls == 4 and os.environ['RANK'] == '1' and not Path('killed').exists():\n"
        "        Path('killed').touch()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return images.mean((1, 2, 3)).tolist()\n"
    )
    done = launch(2, "--max-restarts=1", *train("--name=run", "--reward=deadly.py:score"), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "killed").exists()
    assert "exitcode: -9" in done.stderr
    iterations = [row["iteration"] for row in log_of(tmp_path / "run") if "seconds/rollout" in row]
    assert iterations == [1, 2, 3]


def test_two_machines_make_one_run(tmp_path: Path):
    """Two launchers on this machine, by the script of docs/scaling.md."""
    script = str(TESTS.parent / "docs" / "multi_node.sh")
    found = os.environ | {
        "NODES": "2",
        "HOST": "localhost",
        "PORT": str(_free_port()),
        "GPUS": "1",
        "OMP_NUM_THREADS": "1",
    }
    found["PATH"] = f"{Path(sys.executable).parent}:{found['PATH']}"
    command = ["sh", script, "mini", *SMALL, "--iterations=1", "--name=run"]
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    machines = [subprocess.Popen(command, env=found, cwd=folder) for folder in folders]
    try:
        assert [machine.wait(timeout=LIMIT) for machine in machines] == [0, 0]
    finally:
        for machine in machines:
            machine.kill()
    written = [(folder / "run" / "lora").is_dir() for folder in folders]
    assert sorted(written) == [False, True]  # either may have become the first


def test_what_one_process_raises_ends_all_and_is_told_once(tmp_path: Path):
    (tmp_path / "wrong.py").write_text(
        "import os\n"
        "from tdm_r1.errors import UserError\n\n"
        "def score(images, prompts, metadata):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise UserError('the licence has expired')\n"
        "    return images.mean((1, 2, 3)).tolist()\n"
    )
    done = launch(2, *train("--name=run", "--reward=wrong.py:score"), folder=tmp_path)
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if line.startswith("tdm-r1")]
    assert told == ["tdm-r1, process 1: the licence has expired"]


@pytest.mark.parametrize(("setting", "told"), [("--batch.group=0", "config.batch"), ("--iterations=-1", "iterations")])
def test_a_setting_that_is_wrong_is_told_once(setting: str, told: str, tmp_path: Path):
    done = launch(2, *train("--name=run", setting), folder=tmp_path)
    assert done.returncode == 1
    assert (done.stdout + done.stderr).count(told) == 1


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_process_is_named(frozen: int, tmp_path: Path):
    """It stops in the middle of the run; the other, which waits for it, says so and ends."""
    (tmp_path / "world.py").write_text(
        "import os, signal, sys, torch, torch.distributed as dist\n"
        "from tdm_r1.train.heartbeat import heartbeat\n"
        "dist.init_process_group('gloo')\n"
        "with heartbeat(interval=0.3, limit=3.0):\n"
        "    dist.all_reduce(torch.ones(1))\n"
        "    if dist.get_rank() == int(sys.argv[1]):\n"
        "        os.kill(os.getpid(), signal.SIGSTOP)\n"
        "    dist.all_reduce(torch.ones(1))\n"
    )
    found = dict(
        os.environ, WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(_free_port()), OMP_NUM_THREADS="1"
    )
    command = [sys.executable, str(tmp_path / "world.py"), str(frozen)]
    with ExitStack() as open_files:
        errors = [open_files.enter_context((tmp_path / f"{i}.log").open("w")) for i in (0, 1)]
        both = [subprocess.Popen(command, env=found | {"RANK": str(i)}, stderr=errors[i]) for i in (0, 1)]
        try:
            assert both[1 - frozen].wait(timeout=60) == 1
        finally:
            for process in both:
                process.kill()
                process.wait()
    told = (tmp_path / f"{1 - frozen}.log").read_text()
    assert f"process {frozen} of 2, on " in told
    assert f"process {1 - frozen} ends" in told


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])
