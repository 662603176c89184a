"""Mutation testing: changes of the code that no fast test notices.

Run: ``make mutants`` (mutmut changes `core/` and `algorithms/`, one expression at a time, and runs the fast tests that
touch the function; about two hours on two cores, and it goes on where it was stopped). Writes
docs/results/mutants.json and .md. Without ``--run`` it reads what an earlier run left in `mutants/`.
``benchmarks/mutants.yaml`` has the reason for each survivor that was read: by function and change, or by a pattern.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import yaml

KILLED = {1, 3}
TIMEOUT = {36, 24, -24, 152, 255}
REASONS = Path("benchmarks/mutants.yaml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", action="store_true", help="run mutmut first")
    parser.add_argument("--out", type=Path, default=Path("docs/results/mutants.json"))
    args = parser.parse_args()
    if args.run:
        subprocess.run([sys.executable, "-m", "mutmut", "run"], check=False)
    found: dict[str, int | None] = {}
    for meta in sorted(Path("mutants/src").rglob("*.meta")):
        found |= json.loads(meta.read_text())["exit_code_by_key"]
    checked = {key: code for key, code in found.items() if code is not None}
    caught = [key for key, code in checked.items() if code in KILLED | TIMEOUT]
    reasons = yaml.safe_load(REASONS.read_text()) or ()
    survivors = []
    for key in sorted(set(checked) - set(caught)):
        function, change = key.rpartition("__mutmut_")[0], change_of(key)
        survivors.append({"function": function, "change": change, "why": reason(reasons, function, change)})
    result = {
        "mutants": len(found),
        "checked": len(checked),
        "caught": len(caught),
        "by_file": {file: list(count) for file, count in by_file(checked, set(caught)).items()},
        "survivors": survivors,
    }
    args.out.write_text(json.dumps(result, indent=1))
    args.out.with_suffix(".md").write_text(page(result))
    print(f"{len(caught)} of {len(checked)} tried were caught ({100 * len(caught) / len(checked):.1f} %)")


def reason(reasons: Sequence[dict[str, str]], function: str, change: str) -> str:
    """Of the first entry for the function and this very change, or whose pattern the change matches; "" if none is."""
    for entry in reasons:
        own = entry.get("function") in (None, function) and entry.get("change") in (None, change)
        if own and ("pattern" not in entry or re.search(entry["pattern"], change)):
            return entry["why"]
    return ""


def by_file(checked: dict[str, int], caught: set[str]) -> dict[str, tuple[int, int]]:
    """(caught, all) of each module."""
    module = {key: key.rpartition(".x")[0] for key in checked}
    every, good = Counter(module.values()), Counter(module[key] for key in caught)
    return {name: (good[name], n) for name, n in sorted(every.items())}


def change_of(key: str) -> str:
    """The changed line before and after."""
    shown = subprocess.run([sys.executable, "-m", "mutmut", "show", key], capture_output=True, text=True, check=True)
    lines = [line for line in shown.stdout.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    before, after = (" ".join(line[1:].strip() for line in lines if line[0] == sign) for sign in "-+")
    return f"{before} => {after}"


def page(result: dict) -> str:
    share = 100 * result["caught"] / result["checked"]
    unread = sum(not s["why"] for s in result["survivors"])
    lines = [
        "# Mutation testing",
        "",
        f"Written by `make mutants`: mutmut finds {result['mutants']} changes of `core/` and `algorithms/`, of which",
        f"{result['checked']} were tried. The fast tests caught {result['caught']} of these ({share:.1f} %). "
        f"{len(result['survivors'])} survived; {unread} have no",
        "reason written down.",
        "",
        "| module | caught | changes |",
        "|---|---|---|",
        *(f"| `{name}` | {good} | {every} |" for name, (good, every) in result["by_file"].items()),
        "",
        "## Survivors",
        "",
        "| function | change | why no test notices |",
        "|---|---|---|",
    ]
    for s in result["survivors"]:
        change = s["change"].replace("|", "\\|")
        lines.append(f"| `{s['function'].removeprefix('tdm_r1.')}` | `{change}` | {s['why']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
