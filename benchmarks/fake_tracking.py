"""Whether the fake score knows the generator that it stands for: a run's generator is held, its fake score learns on.

The KL part of the direction is only as good as the fake score. Its many-step samples are compared with the generator's
own pictures of the same prompts, before and after updates in which the generator does not move, at several learning
rates, on all points of the trajectories or on x_0 alone: if they come closer, the fake score had lagged. With
`tdm.fake_scores = two` it is the fake score of x_0 that is looked at.

Run: ``python benchmarks/fake_tracking.py RUN`` (a folder with a checkpoint of recipe `mini`'s kind; writes
docs/results/fake_tracking.json and .md).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from surrogate_signal import tdm_r1_of
from tdm_r1.algorithms.tdm import fake_roles
from tdm_r1.config import load_recipe
from tdm_r1.evaluation import Evaluation, Sampling
from tdm_r1.mini.bundle import bundle_path
from tdm_r1.mini.features import frechet_distance, load_features
from tdm_r1.randomness import numpy_rng, torch_rng
from tdm_r1.roles import Role
from tdm_r1.trainer import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument(
        "--rates", nargs="+", default=["1e-3", "2e-4", "1e-3:final"], help="RATE, or RATE:final for x_0"
    )
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("docs/results/fake_tracking.json"))
    args = parser.parse_args()
    measured = [measure(args.run, rate, args.updates, args.prompts) for rate in args.rates]
    rows = measured[0][:2] + [after for *_, after in measured]  # generator and fake score start alike at every rate
    result = {
        "command": shlex.join(sys.argv[1:]),
        "run": args.run.name,
        "updates": args.updates,
        "pictures": args.prompts,
        "rows": rows,
    }
    args.out.write_text(json.dumps(result, indent=1))
    args.out.with_suffix(".md").write_text(markdown(result))
    print(args.out.with_suffix(".md").read_text())


def measure(folder: Path, rate: str, updates: int, prompts: int) -> list[dict]:
    """The generator, and its fake score before and after ``updates`` at ``rate``."""
    config = load_recipe(str(folder))
    value, colon, points = rate.partition(":")
    if colon and points != "final":
        raise SystemExit(f"--rates {rate}: give RATE, or RATE:final")
    changes = {"tdm.fake.learning_rate": float(value), "tdm.fake.decay_share": 0.0}
    few = {"evaluation.prompts": prompts, "evaluation.images_per_prompt": 1}
    run = Run(config.override({"output": folder.parent, "name": folder.name} | changes | few))
    run.load(run.checkpoints()[-1])
    fake = fake_roles(config.tdm)[-1]
    final = points == "final" or fake is Role.FAKE_FINAL
    evaluate = run.evaluator()
    generated = evaluate(run.few_step())
    rows = [described("generator", "", generated, generated)]
    for done in (0, updates):
        for update in track(range(done), f"fake score at {rate}"):
            fit_fake(run, update, fake, final=final)
        samples = evaluate(Sampling(fake, 20, config.sampler.shift, guidance=1.0))
        what = "fake score of x_0" if fake is Role.FAKE_FINAL else "fake score"
        rows.append(described(f"{what}, {done} updates", rate if done else "", samples, generated))
    return rows


def fit_fake(run: Run, update: int, fake: Role, *, final: bool) -> None:
    """One update on fresh samples of the generator, at all points of their trajectories or at x_0 alone."""
    c, tdm = run.config, tdm_r1_of(run).tdm
    prompts = run.task.train_prompts(c.batch.prompts, numpy_rng(c.seed, update, "fake tracking"))
    conditioning = run.embed([p.text for p in prompts for _ in range(c.batch.group)])
    noise = torch_rng(c.seed, update, "fake tracking")
    x_1 = torch.randn((len(conditioning), *run.backbone.latent_shape), generator=noise)
    tdm.fit_fake_at("final" if final else "all", fake, tdm.roll_out(conditioning, x_1, noise), noise)


def described(what: str, rate: str, samples: Evaluation, generated: Evaluation) -> dict:
    """strict; the ground's grey level and its spread; Frechet distance to the generator's pictures."""
    net = load_features(bundle_path() / "features.safetensors")
    grounds = np.median(samples.images[:, :2].reshape(len(samples.images), -1), axis=1)
    return {
        "of": what,
        "rate": rate,
        "strict": round(samples.metrics["strict"], 3),
        "ground": round(float(grounds.mean()), 1),
        "ground_spread": round(float(grounds.std()), 2),
        "distance": round(frechet_distance(net(samples.images), net(generated.images)), 2),
    }


def markdown(result: dict) -> str:
    lines = [
        "# What the fake score knows of the generator",
        "",
        f"Written by `python benchmarks/fake_tracking.py {result['command']}`: the run's",
        "generator is held while its fake score learns on, from all points of the trajectories or (final) from x_0",
        f"alone. {result['pictures']} pictures, the fake score's in 20 steps. Ground: mean and deviation over pictures",
        "of its grey level. Distance: Frechet, to the generator's own pictures.",
        "",
        "| samples of | learning rate | strict | ground | distance to the generator's |",
        "|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        ground = f"{r['ground']:.1f} ± {r['ground_spread']:.1f}"
        lines.append(f"| {r['of']} | {r['rate']} | {r['strict']:.3f} | {ground} | {r['distance']:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
