"""What the sampler itself costs: the share of a Best-of-8 run that is neither denoiser, head nor VAE.

    python benchmarks/sampler_overhead.py

A ratio within one run, so that it holds on any machine. Prints one line a setting; ends with code 1 where one reaches
5 %.
"""

from __future__ import annotations

import sys

import torch

import prism

LIMIT = 0.05
REPEATS = 3
SETTINGS = {
    "early 5:1, one batch": {"schedule": [(5, 1)]},
    "early 5:1, one by one": {"schedule": [(5, 1)], "batch_size": 1},
    "early 3:4,6:2,9:1": {"schedule": [(3, 4), (6, 2), (9, 1)]},
    "draft of 3 steps": {"strategy": "draft", "draft_steps": 3},
    "full": {"strategy": "full"},
}


def main() -> int:
    pipe = prism.shapeworld.pipeline()
    pipe.set_progress_bar_config(disable=True)
    judge = prism.Judge.untrained(pipe, tap=4, dim=256)  # what it prefers does not matter here, what it costs does
    prompt = prism.shapeworld.prompts("validation")[0]
    prism.best_of_n(pipe, judge, prompt, n=8, **prism.shapeworld.CALL)  # the first run pays for what is set up once
    print(f"Best-of-8 on ShapeWorld, {torch.get_num_threads()} threads, median of {REPEATS} runs")
    shares = []
    for name, options in SETTINGS.items():
        ledgers = [
            prism.best_of_n(pipe, judge, prompt, n=8, seed=seed, **options, **prism.shapeworld.CALL).ledger
            for seed in range(REPEATS)
        ]
        ledger = sorted(ledgers, key=lambda ledger: ledger.overhead_seconds / ledger.seconds)[REPEATS // 2]
        shares.append(ledger.overhead_seconds / ledger.seconds)
        parts = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in ledger.parts.items())
        print(f"{name:24s} overhead {shares[-1]:6.1%} of {ledger.seconds:5.2f} s ({parts})")
    return int(max(shares) >= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
