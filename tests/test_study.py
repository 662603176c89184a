"""`tdm-r1 study`: whole rows on the bundled model with tiny budgets, and the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from tdm_r1.algorithms.registry import CHECKS
from tdm_r1.cli import main
from tdm_r1.errors import UserError
from tdm_r1.mini.study import SETTINGS_READ, Study, _only_read, _within, run_study, stale
from tdm_r1.mini.study_page import write_page
from tdm_r1.mini.study_search import ALL

BY_NAME = {row.name: row for row in ALL}


def study(folder: Path, *names: str, scored: int = 128, seeds: tuple[int, ...] = (0,)) -> Study:
    rows = [BY_NAME[name] for name in names]
    return Study("mini", scored, 6, rows, seeds, folder / "results", folder / "runs")


@pytest.mark.parametrize("world", ["mini", "mini_signs"])
@pytest.mark.parametrize("row", ALL, ids=lambda row: row.name)
def test_every_row_has_settings_that_can_run(world: str, row, tmp_path: Path):
    one = Study(world, 7680, 300, [row], (0,), tmp_path, tmp_path)
    config = one.config(row, 1)
    assert config.iterations * config.batch.prompts * config.batch.group == 7680 * row.budget
    assert config.model.path == world
    assert (config.model.student_lora == world) or ("-many" in row.name and config.sampler.guidance == 2)
    assert len({one.record_of(r, seed) for r in ALL for seed in (0, 1)}) == 2 * len(ALL)


def test_an_unknown_row_is_an_error(capsys: pytest.CaptureFixture):
    assert main(["study", "mini", "--only", "nowhere"]) == 2
    assert "--only = 'nowhere'" in capsys.readouterr().err
    assert main(["study", "mini_signs", "--only", "reward: count"]) == 2
    assert "'reward: count' with mini_signs" in capsys.readouterr().err
    assert main(["study", "--list"]) == 0
    assert "DiffusionNFT" in capsys.readouterr().out


def test_a_row_that_needs_another_says_which(tmp_path: Path):
    with pytest.raises(UserError, match="p-phi needs the run of tdm-r1, seed 0"):
        run_study(study(tmp_path, "p-phi"), Console(quiet=True))


@pytest.mark.slow
def test_rows_are_run_once_and_the_page_shows_them(tmp_path: Path):
    """The start, one method, its surrogate sampled and used frozen, the distillation from a merged teacher."""
    names = ("start", "tdm-r1", "p-phi", "frozen", "dgpo-many", "dgpo-then-tdm")
    one = study(tmp_path, *names)
    run_study(one, Console(quiet=True))
    records = {name: json.loads(one.record_of(BY_NAME[name], 0).read_text()) for name in names}
    assert [records[n]["network_evaluations"] for n in names] == [4, 4, 40, 4, 20, 4]
    assert records["tdm-r1"]["scored"] == records["dgpo-many"]["scored"] == 128
    assert records["tdm-r1"]["passes"] > 128 * 20
    assert [p["iteration"] for p in records["tdm-r1"]["curve"]] == [0, 1]
    assert len(records["start"]["pictures"]) == 6
    assert records["start"]["end"] != records["tdm-r1"]["end"]  # on the same noise: the run has moved the model
    assert records["frozen"]["scored"] == 256  # with those of the run that it takes the surrogate of
    assert records["frozen"]["end"] not in (records["start"]["end"], records["tdm-r1"]["end"])
    page = (one.results / "mini.md").read_text()
    for name in names:
        assert f"| {name} |" in page
    assert all((one.results / f"mini_{what}.png").exists() for what in ("curves", "grid"))
    stamps = {name: one.record_of(BY_NAME[name], 0).stat().st_mtime_ns for name in names}
    run_study(one, Console(quiet=True))
    assert stamps == {name: one.record_of(BY_NAME[name], 0).stat().st_mtime_ns for name in names}
    assert records["dgpo-then-tdm"]["scored"] == records["dgpo-many"]["scored"]  # its teacher's
    assert records["dgpo-then-tdm"]["passes"] > records["dgpo-many"]["passes"]
    assert "†" not in page.replace("Rows with †", "")
    assert stale(study(tmp_path, "start", scored=256)) == {"tdm-r1", "p-phi", "frozen", "dgpo-many", "dgpo-then-tdm"}
    assert "| tdm-r1 † |" in write_page(one.results, "mini", {"tdm-r1"}).read_text()
    run_study(study(tmp_path, "start", scored=256), Console(quiet=True))  # it has no budget
    assert stamps["start"] == one.record_of(BY_NAME["start"], 0).stat().st_mtime_ns
    with pytest.raises(UserError, match="has a run with iterations = 1, wanted is 2: remove it"):
        run_study(study(tmp_path, "tdm-r1", scored=256), Console(quiet=True))


def test_settings_of_other_algorithms_do_not_count():
    assert SETTINGS_READ.keys() == CHECKS.keys()
    config = {"algorithm": "dgpo", "seed": 0, "dgpo": {"beta": 1}, "balance": {"scale": 4}, "nft": {}}
    assert _only_read({"world": "mini", "config": config, "after": {"config": config | {"algorithm": "nft"}}}) == {
        "world": "mini",
        "config": {"algorithm": "dgpo", "seed": 0, "dgpo": {"beta": 1}},
        "after": {"config": {"algorithm": "nft", "seed": 0, "nft": {}}},
    }
    assert _only_read({"config": {"model": {}}}) == {"config": {"model": {}}}


def test_a_record_is_good_for_the_same_settings_and_for_settings_that_came_later():
    old = {"world": "mini", "config": {"seed": 0, "batch": {"group": 16}}}
    assert _within(old, {"world": "mini", "config": {"seed": 0, "batch": {"group": 16, "new": 1}, "more": {}}})
    assert not _within(old, {"world": "mini", "config": {"seed": 1, "batch": {"group": 16}}})
    assert not _within(old, {"world": "mini", "config": {"seed": 0}})
