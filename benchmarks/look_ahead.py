"""Cuts as they stand beside cuts that look ahead, on ShapeWorld: the oracle's gain that each pick keeps, and its cost.

`python benchmarks/look_ahead.py --out runs/look_ahead.jsonl` runs Best-of-8 of each plan on the test prompts, a line
per prompt; a stopped run goes on. At the end: each plan's share of the oracle's gain with an interval over prompts, its
rows as a share of `full`'s, and the paired differences to two cuts as they stand.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import prism
from prism import shapeworld
from prism.evaluation import clustered_bootstrap
from prism.shapeworld import grammar, referee

PLANS: dict[str, dict[str, Any]] = {
    "now 4:1": {"schedule": "4:1"},
    "now 6:1": {"schedule": "6:1"},
    "ahead 3:1": {"schedule": "3:1", "look": "ahead"},
    "ahead 4:1": {"schedule": "4:1", "look": "ahead"},
    "ahead 4:1, one draw": {"schedule": "4:1", "look": "ahead", "num_draws": 1},
    "conditional 4:1": {"schedule": "4:1", "look": "ahead-conditional"},
    "conditional 5:1": {"schedule": "5:1", "look": "ahead-conditional"},
    "full": {"strategy": "full"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/look_ahead.jsonl"))
    parser.add_argument("--split", default="test")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--n", type=int, default=8)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    torch.set_num_threads(1)
    pipe, call = shapeworld.pipeline(), shapeworld.CALL
    judge = prism.Judge.from_pretrained(shapeworld.asset_folder("head"), pipe)
    seen = {row["prompt"] for row in done}
    prompts = [prompt for prompt in grammar.prompts(options.split, options.prompts) if prompt not in seen]
    with options.out.open("a") as file:
        for prompt in tqdm(prompts, "prompts"):
            every = prism.best_of_n(pipe, None, prompt, options.n, strategy="oracle", oracle=referee.score, **call)
            row = {"prompt": prompt, "referee": every.scores[0]["scores"]["overall"], "plans": {}}
            for name, plan in PLANS.items():
                result = prism.best_of_n(pipe, judge, prompt, options.n, **plan, **call)
                row["plans"][name] = [result.index, result.ledger.denoiser_rows, result.ledger.seconds]
            file.write(json.dumps(row) + "\n")
            file.flush()
            done.append(row)
    report(done)


def report(rows: list[dict[str, Any]]) -> None:
    """Print a line per plan; intervals are of prompts drawn anew."""
    values = np.array([row["referee"] for row in rows])
    best = values.max(1) - values.mean(1)
    prompts = np.arange(len(rows))
    gains = {
        name: values[prompts, [row["plans"][name][0] for row in rows]] - values.mean(1) for name in rows[0]["plans"]
    }
    whole = np.mean([row["plans"]["full"][1] for row in rows])
    for name, gain in gains.items():
        low, high = clustered_bootstrap(gain / best.mean(), prompts)
        cost = np.mean([row["plans"][name][1] for row in rows]) / whole
        line = f"{name:22s} {gain.mean() / best.mean():.3f} ({low:.3f} to {high:.3f}) at {cost:.3f} of full's rows"
        for other in ("now 4:1", "now 6:1"):
            if other != name:
                low, high = clustered_bootstrap((gain - gains[other]) / best.mean(), prompts)
                line += (
                    f"; minus {other}: {(gain - gains[other]).mean() / best.mean():+.3f} ({low:+.3f} to {high:+.3f})"
                )
        print(line)


if __name__ == "__main__":
    main()
