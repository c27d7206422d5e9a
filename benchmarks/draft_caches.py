"""Cached drafts beside few-step drafts, on ShapeWorld: how much of the seeds' order and of the oracle's gain they keep.

`python benchmarks/draft_caches.py --out runs/draft_caches.jsonl` drafts 8 seeds of each validation prompt in every way
of `DRAFTS` and decodes them, a line per prompt; a stopped run goes on. At the end, per way: the denoiser rows of the
drafts as a share of full sampling, the rank correlation with the referee's scores of the finished videos, and the share
of the oracle's gain of the pick by the referee and by the judge on the drafts, with intervals over prompts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from tqdm import tqdm

import prism
from prism import shapeworld
from prism.evaluation import clustered_bootstrap
from prism.sampling.ledger import Meter
from prism.sampling.plan import Candidate, generator_of
from prism.sampling.recording import Recording
from prism.sampling.step_cache import Drafter, StepCache, parse
from prism.shapeworld import grammar, referee
from prism.video import frames

WAYS = [
    *(f"first-block:{threshold}" for threshold in (0.1, 0.15, 0.2)),
    *(f"taylorseer:{interval}" for interval in (2, 3, 4, 6)),
    *("guidance:0.5", "taylorseer:3,guidance:0.5", "taylorseer:4,guidance:0.5"),
]
# By name: the draft's number of steps (None: all), its cache, and the candidates that share a batch.
DRAFTS: dict[str, tuple[int | None, StepCache, int]] = {"full": (None, StepCache(), 8)}
DRAFTS |= {f"{steps} steps": (steps, StepCache(), 8) for steps in (3, 6, 7, 9, 11)}
DRAFTS |= {way: (None, parse(way), 8) for way in WAYS}


def drafted(judge: Any, prompt: str, n: int, way: tuple[int | None, StepCache, int]) -> dict[str, Any]:
    """The referee's and the judge's scores of n drafts, and their denoiser rows."""
    steps, cache, size = way
    backbone = judge.backbone
    call = {**shapeworld.CALL, **({} if steps is None else {"num_inference_steps": steps}), "output_type": "np"}
    seen, judged, rows = [], [], 0.0
    for start in range(0, n, size):
        candidates = [Candidate(seed, seed) for seed in range(start, min(start + size, n))]
        recordings = {candidate: Recording() for candidate in candidates}
        drafter = Drafter(
            cache,
            backbone,
            candidates,
            recordings,
            guided_steps=cache.guided_steps(call["num_inference_steps"]),
            record=False,
        )
        batch = backbone.batch([prompt] * len(candidates), [candidate.seed for candidate in candidates], call)
        with backbone.held(), Meter(backbone).open() as ledger, torch.no_grad():
            output = drafter.run({**call, **batch})
        rows += ledger.denoiser_rows
        seen += [referee.score(torch.as_tensor(frames(video)), prompt)["overall"] for video in output[0]]
        scores, _ = judge.score_clean(
            drafter.finished(), prompt, 700.0, num_draws=2, generator=generator_of(1), **shapeworld.CALL
        )
        judged += scores[:, judge.dimensions.index("overall")].tolist()
    return {"referee": seen, "judge": judged, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/draft_caches.jsonl"))
    parser.add_argument("--split", default="validation")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--n", type=int, default=8)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    torch.set_num_threads(1)
    judge = prism.Judge.from_pretrained(shapeworld.asset_folder("head"), shapeworld.pipeline())
    seen = {row["prompt"] for row in done}
    prompts = [prompt for prompt in grammar.prompts(options.split, options.prompts) if prompt not in seen]
    with options.out.open("a") as file:
        for prompt in tqdm(prompts, "prompts"):
            row = {
                "prompt": prompt,
                "drafts": {name: drafted(judge, prompt, options.n, way) for name, way in DRAFTS.items()},
            }
            file.write(json.dumps(row) + "\n")
            file.flush()
            done.append(row)
    report(done)


def report(rows: list[dict[str, Any]]) -> None:
    """Print a line per way of drafting; intervals are of prompts drawn anew."""
    full = np.array([row["drafts"]["full"]["referee"] for row in rows])
    best, prompts = full.max(1) - full.mean(1), np.arange(len(rows))
    cost = np.mean([row["drafts"]["full"]["rows"] for row in rows])
    for name in [name for name in rows[0]["drafts"] if all(name in row["drafts"] for row in rows)]:
        drafts = [row["drafts"][name] for row in rows]
        orders = [
            spearmanr(draft["referee"], whole).statistic for draft, whole in zip(drafts, full) if np.ptp(whole) > 0
        ]
        line = f"{name:30s} {np.mean([draft['rows'] for draft in drafts]) / cost:.3f} of full's rows"
        line += f", rank correlation {np.nanmean(orders):.3f}"
        for who in ("referee", "judge"):
            picks = [int(np.argmax(draft[who])) for draft in drafts]
            gain = full[prompts, picks] - full.mean(1)
            low, high = clustered_bootstrap(gain / best.mean(), prompts)
            line += f"; {who} {gain.mean() / best.mean():.3f} ({low:.3f} to {high:.3f})"
        print(line)


if __name__ == "__main__":
    main()
