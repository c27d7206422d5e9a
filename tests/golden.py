"""The golden run: a short training on the store that ships, accuracies and a Best-of-N.

`make golden` (`python -m tests.golden`) writes tests/golden.json anew; tests/test_golden.py compares a run with it.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

import prism
from prism import shapeworld
from prism.evaluation import evaluate

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


if __name__ == "__main__":
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        FILE.write_text(json.dumps(run(), indent=1) + "\n", encoding="utf-8")
    print(FILE)
