"""Searches whose candidates part beside early, full and more steps, on ShapeWorld: the oracle's gain that each keeps.

`python benchmarks/searches.py --out runs/searches.jsonl` runs each arm with eight candidates on the test prompts;
`--budgets 1.5 2 3 4` gives each arm instead, at each budget, as many candidates as it pays for (in costs of one plain
sample, by the plan's rows in closed form). A line per prompt; a stopped run goes on. The referee judges the decoded
winner, which is none of the eight seeds where candidates part. At the end, per arm: its share of the gain of the
oracle's best of eight with an interval over prompts, its rows as a share of full Best-of-8's, and paired differences.
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
from prism.sampling import Plan
from prism.sampling.noise_search import Evolution, LatentBeams, ZeroOrder
from prism.sampling.particles import FKSteering, Prune
from prism.sampling.plan import Workload
from prism.sampling.strategies import Early, Full, Random
from prism.shapeworld import grammar, referee

EIGHT, MOST = 8, 32  # candidates of the oracle's gain, and of an arm
LONGER = "one candidate with more steps"
ARMS: dict[str, Plan] = {
    "random": Random(),
    "early 4:1": Early(schedule=[(4, 1)]),
    "early 6:1": Early(schedule=[(6, 1)]),
    "ahead 4:1": Early(schedule=[(4, 1)], look="ahead"),
    "full": Full(),
    "fk": FKSteering(),
    "fk, one kept": FKSteering(keep=1, resampling_t_end=8),
    "fk, lambda 1, one kept": FKSteering(lmbda=1.0, keep=1, resampling_t_end=8),
    "beam": LatentBeams(),
    "beam, one kept": LatentBeams(keep=1),
    "prune": Prune(),
    "prune of seeds": Prune(beta=None),
    "evolution": Evolution(),
    "evolution, one kept": Evolution(evolution_schedule=[4, 6, 8], keep=1),
    "zero-order": ZeroOrder(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/searches.jsonl"))
    parser.add_argument("--split", default="test")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budgets", type=float, nargs="*", default=[])
    parser.add_argument("--arms", nargs="*", default=[*ARMS, LONGER], help="by name")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    torch.set_num_threads(1)
    pipe, call = shapeworld.pipeline(), shapeworld.CALL
    judge = prism.Judge.from_pretrained(shapeworld.asset_folder("head"), pipe)
    runs = arms(judge, call, options.budgets, options.arms)
    seen = {row["prompt"] for row in done}
    prompts = [prompt for prompt in grammar.prompts(options.split, options.prompts) if prompt not in seen]
    with options.out.open("a") as file:
        for prompt in tqdm(prompts, "prompts"):
            every = prism.best_of_n(
                pipe, None, prompt, EIGHT, seed=options.seed, strategy="oracle", oracle=referee.score, **call
            )
            row = {"prompt": prompt, "referee": every.scores[0]["scores"]["overall"], "arms": {}}
            for name, (n, plan, changes) in runs.items():
                result = prism.best_of_n(
                    pipe, judge, prompt, n, plan=plan, seed=options.seed, **{**call, "output_type": "np", **changes}
                )
                value = referee.score(torch.as_tensor(result.video), prompt)["overall"]
                row["arms"][name] = [value, result.ledger.denoiser_rows, result.ledger.seconds, n]
            file.write(json.dumps(row) + "\n")
            file.flush()
            done.append(row)
    report(done)


def arms(judge: Any, call: dict[str, Any], budgets: list[float], names: list[str]) -> dict[str, Any]:
    """(candidates, plan, changes of the call) per arm and budget; those that a budget does not pay for are left out."""
    sample = cost(Random(), judge, call, 1)
    if not budgets:
        return {name: (EIGHT, ARMS[name], {}) for name in names if name in ARMS}
    runs = {}
    for budget in budgets:
        for name in names:
            if name == LONGER:
                steps = round(budget * call["num_inference_steps"])
                runs[f"{name} at {budget:g}"] = (1, Random(), {"num_inference_steps": steps})
                continue
            sizes = [
                n
                for n in range(2, MOST + 1)
                if fits(ARMS[name], n) and cost(ARMS[name], judge, call, n) <= budget * sample
            ]
            if name != "random" and sizes:
                runs[f"{name} at {budget:g}"] = (max(sizes), ARMS[name], {})
    return runs


def fits(plan: Plan, n: int) -> bool:
    """True if the plan takes n candidates."""
    try:
        plan.checked(n, 1, 20, {})
    except prism.PrismError:
        return False
    return True


def cost(plan: Plan, judge: Any, call: dict[str, Any], n: int) -> float:
    """The rows of a plan, in closed form."""
    load = Workload.of(judge.backbone, call, n, judge.tap)
    return plan.settled(load).rows(load)


def report(rows: list[dict[str, Any]]) -> None:
    """Print a line per arm; intervals are of prompts drawn anew."""
    values = np.array([row["referee"] for row in rows])
    mean, best = values.mean(1), (values.max(1) - values.mean(1)).mean()
    prompts = np.arange(len(rows))
    whole = EIGHT * 2 * shapeworld.CALL["num_inference_steps"]
    gains = {name: np.array([row["arms"][name][0] for row in rows]) - mean for name in rows[0]["arms"]}
    for name, gain in gains.items():
        low, high = clustered_bootstrap(gain / best, prompts)
        cost = np.mean([row["arms"][name][1] for row in rows]) / whole
        line = f"{name:32s} n {rows[0]['arms'][name][3]:2d} {gain.mean() / best:.3f} ({low:.3f} to {high:.3f})"
        line += f" at {cost:.3f} of the rows of eight"
        _, _, budget = name.partition(" at ")
        for other in ("early 4:1", "ahead 4:1"):
            against = gains.get(f"{other} at {budget}" if budget else other)
            if against is not None and against is not gain:
                low, high = clustered_bootstrap((gain - against) / best, prompts)
                line += f"; minus {other}: {(gain - against).mean() / best:+.3f} ({low:+.3f} to {high:+.3f})"
        print(line)


if __name__ == "__main__":
    main()
