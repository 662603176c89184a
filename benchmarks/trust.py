"""How far a run can be trusted, on one page: what the other benchmarks have filed.

Run: ``python benchmarks/trust.py`` (writes docs/results/trust.md from kills.json, rewards.json and bad_inputs.json
beside it; to be run again after the commands that write those).
"""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path("docs/results")


def page(results: Path) -> str:
    kills, rewards, bad = (json.loads((results / f"{n}.json").read_text()) for n in ("kills", "rewards", "bad_inputs"))
    lines = ["# How far a run can be trusted", "", "Written by `python benchmarks/trust.py`; not edited by hand.", ""]
    for row in kills:
        different = ", ".join(row["different"]) or "nothing"
        lines.append(
            f"- Stopped {len(row['kills'])} times by {row['by']}, {row['processes']} process(es), {row['iterations']} "
            f"iterations: {different} is different at the end ([kills.md](kills.md))."
        )
    went_on = [row for row in rewards if not row["stopped"]]
    same = sum(row["same_weights"] for row in went_on)
    lines += [
        f"- Rewards that fail in {len(rewards)} ways, in this process, in workers, in Ray's actors, behind a server: "
        f"{len(went_on)} runs went on, {same} of them with the weights of a run that lacks the same scores and nothing "
        f"else; {len(rewards) - len(went_on)} stopped with an explanation ([rewards.md](rewards.md)).",
        f"- Bad input: {sum(not row['wrong'] for row in bad)} of {len(bad)} commands end with a message that names "
        "what is wrong, and nothing that was there is lost ([bad_inputs.md](bad_inputs.md)).",
        "- Rewards that are exploited, and when the alarm comes: [alarms.md](alarms.md).",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (RESULTS / "trust.md").write_text(page(RESULTS))
    print(page(RESULTS))
