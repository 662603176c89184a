"""How long imports, help and the dry run take, each in a process of its own.

Run: ``python benchmarks/startup.py`` (writes docs/results/startup.json and .md; some two minutes).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = {  # name: (arguments of Python, repetitions, seconds that are aimed at)
    "import tdm_r1": (["-c", "import tdm_r1"], 10, 0.3),
    "tdm-r1 --help": (["-m", "tdm_r1", "--help"], 10, 0.3),
    "tdm-r1 train mini --help": (["-m", "tdm_r1", "train", "mini", "--help"], 10, 1.5),
    "tdm-r1 train mini --dry-run": (["-m", "tdm_r1", "train", "mini", "--dry-run"], 3, 8.0),
    "tdm-r1 train sd35m_geneval --dry-run": (["-m", "tdm_r1", "train", "sd35m_geneval", "--dry-run"], 3, 8.0),
    "tdm-r1 train zimage_geneval --dry-run": (["-m", "tdm_r1", "train", "zimage_geneval", "--dry-run"], 3, 8.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results/startup.json"))
    args = parser.parse_args()
    rows = []
    for name, (command, repetitions, aim) in COMMANDS.items():
        seconds = sorted(measure(command) for _ in range(repetitions + 1))  # the slowest is the one that fills caches
        rows.append({"command": name, "best": seconds[0], "median": seconds[len(seconds) // 2], "aim": aim})
        print(rows[-1])
    args.out.write_text(json.dumps(rows, indent=1))
    lines = [
        "# Start-up",
        "",
        "Written by `python benchmarks/startup.py` on two CPU cores: seconds of a whole process.",
        "",
        "| command | best | median | aim |",
        "|---|---|---|---|",
        *(f"| `{r['command']}` | {r['best']:.2f} | {r['median']:.2f} | {r['aim']:g} |" for r in rows),
    ]
    args.out.with_suffix(".md").write_text("\n".join(lines) + "\n")


def measure(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
