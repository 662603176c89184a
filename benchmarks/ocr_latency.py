"""What reading costs: the OCR rewards on fresh renders of signs, by seconds and by exactness.

Run: ``python benchmarks/ocr_latency.py`` (writes docs/results/ocr.json and ocr.md).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np

from tdm_r1.mini import signs, worlds
from tdm_r1.rewards.ocr import OCRReward, paper_fidelity, rapidocr

ENGINES = {"ocr": rapidocr, "ocr_line": lambda: rapidocr(detect=False)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signs", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("docs/results/ocr.json"))
    args = parser.parse_args()
    rng = np.random.default_rng(3)
    specs = [signs.make_spec(signs.TASK, rng) for _ in range(args.signs)]
    images = worlds.render_specs(specs, seed=3)
    rows = [measure(name, images, specs) for name in ENGINES]
    result = {"signs": args.signs, "cores": os.cpu_count(), "rows": rows}
    args.out.write_text(json.dumps(result, indent=1))
    args.out.with_suffix(".md").write_text(markdown(result))
    print(args.out.with_suffix(".md").read_text())


def measure(name: str, images: np.ndarray, specs: list[dict]) -> dict:
    """Score, exactness and milliseconds a picture, the pictures one by one."""
    reward = OCRReward(paper_fidelity, ENGINES[name]())
    reward(images[:2], ["", ""], specs[:2])  # warm-up
    seconds, scores, exact = [], [], []
    for image, spec in zip(images, specs, strict=True):
        start = time.perf_counter()
        found = reward(image[None], [""], [spec])
        seconds.append(time.perf_counter() - start)
        scores.append(found.values[0])
        exact.append(found.parts["exact"][0])
    return {
        "reward": name,
        "score": round(float(np.mean(scores)), 3),
        "exact": round(float(np.mean(exact)), 3),
        "milliseconds": round(1000 * float(np.median(seconds)), 1),
    }


def markdown(result: dict) -> str:
    lines = [
        "# What reading costs",
        "",
        "Written by `python benchmarks/ocr_latency.py`: RapidOCR on the CPU, one picture at a time,",
        f"{result['signs']} fresh renders of signs with two digits at 64x64, {result['cores']} cores; medians.",
        "",
        "| reward | score of true signs | read exactly | ms a picture | against `ocr` |",
        "|---|---|---|---|---|",
    ]
    slowest = result["rows"][0]["milliseconds"]
    for row in result["rows"]:
        lines.append(
            f"| `{row['reward']}` | {row['score']:.3f} | {row['exact']:.3f} | {row['milliseconds']:.1f} | "
            f"{row['milliseconds'] / slowest:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
