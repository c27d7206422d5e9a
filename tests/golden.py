"""The golden run: a short training on the store that ships, accuracies and a Best-of-N.

`make golden` (`python -m tests.golden`) writes tests/golden.json anew, and golden_claims.json; tests/test_golden.py
compares runs with them.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import prism
from prism import runs, shapeworld
from prism.backbone import Backbone
from prism.evaluation import evaluate, measure, measure_together
from prism.lab import controls
from prism.lab.bench import RECIPE, Bench, Scale
from prism.lab.findings import shares
from prism.lab.judging_power import Subject
from prism.training import train_together

FILE = Path(__file__).with_name("golden.json")
# Few prompts with few noise draws, so that the loss falls within seconds.
CONFIG = prism.TrainConfig(
    steps=60, prompts_per_step=4, learning_rate=2e-3, t_high=300.0, max_prompts=24, noise_draws=2, log_every=5
)
LEVELS = (899, 299)
PROMPT = "a red circle moves right"


def run() -> dict[str, Any]:
    """Loss curve of a new head; accuracies of it and of the head that ships; scores of a Best-of-N with the latter."""
    pipe = shapeworld.pipeline()
    pipe.set_progress_bar_config(disable=True)
    store = prism.LatentStore.open(shapeworld.asset_folder("candidates"))
    new = prism.Judge.untrained(pipe, tap=4, dim=64, dimensions=store.dimensions, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        trained = prism.train(store, new, CONFIG, out=Path(folder) / "run", progress=False)
    shipped = prism.Judge.from_pretrained(shapeworld.asset_folder("head"), pipe)
    call = {**shapeworld.CALL, "num_inference_steps": 8}
    best = prism.best_of_n(pipe, shipped, PROMPT, n=4, schedule=[(3, 2), (5, 1)], seed=3, **call)
    return {
        "pairs": trained["pairs"],
        "loss": {str(entry["step"]): round(entry["loss"], 6) for entry in trained["history"]},
        "accuracy": {"new head": accuracies(new, store), "shipped head": accuracies(shipped, store)},
        "best of 4": {
            "seed": best.seed,
            "denoiser rows": best.ledger.denoiser_rows,
            "scores": {
                f"{name} at step {cut['step']}": [round(score, 6) for score in scores]
                for cut in best.scores
                for name, scores in cut["scores"].items()
            },
        },
    }


def accuracies(judge: prism.Judge, store: prism.LatentStore) -> dict[str, dict[str, float]]:
    """Accuracy and number of the decided validation pairs, per dimension and noise level."""
    return {
        f"{row['dimension']} at t = {row['t']:.0f}": {
            "accuracy": round(row["without_ties"], 6),
            "pairs": row["decided_pairs"],
        }
        for row in evaluate(judge, store, "validation", timesteps=LEVELS, seed=0, progress=False)
    }


CLAIMS = Path(__file__).with_name("golden_claims.json")
SCALE = Scale("golden", seeds=1, train=replace(RECIPE, steps=150, prompts_per_step=6), dim=64, train_prompts=0)
KINDS = ("query", "mean", "depth-1")


def claims() -> dict[str, Any]:
    """What the claims rest on, in less than a minute: heads of three kinds, and one on shuffled weights.

    Accuracy of decided pairs of the shipped store's validation prompts, over t = 699 and 499.
    """
    pipe = shapeworld.pipeline()
    pipe.set_progress_bar_config(disable=True)
    backbone, answers = Backbone(pipe), {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(runs.claim(Path(folder) / "run", {"command": "golden"}), SCALE, backbone, shapeworld.CALL)
        bench.train(KINDS)
        judges = [bench.judges(kind)[0] for kind in KINDS]
        other = controls.shuffled(Subject("default", lambda: backbone), parts=("transformer", "text_encoder")).load()
        alone = bench.untrained("query", 0, other)
        train_together(bench.training, [alone], [SCALE.train], progress=False)
        measured = [*measure_together(judges, bench.training, "validation", (699, 499), progress=False)]
        measured.append(measure(alone, bench.training, "validation", (699, 499), progress=False))
    for name, each in zip((*KINDS, "shuffled weights"), measured):
        found = shares([each])
        answers[name] = {"accuracy": round(found.mean, 6), "pairs": len(found.right)}
    return answers


if __name__ == "__main__":
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for file, make in ((FILE, run), (CLAIMS, claims)):
            file.write_text(json.dumps(make(), indent=1) + "\n", encoding="utf-8")
            print(file)
