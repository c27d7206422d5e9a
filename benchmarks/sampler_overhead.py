"""What the sampler itself costs: the share of a Best-of-8 run that is neither denoiser, head nor VAE.

    python benchmarks/sampler_overhead.py

A ratio within one run, so that it holds on any machine. Prints one line a setting, and the same share of a plain call
of the pipeline, whose scheduler, loop and text encoder are in all of them. Ends with code 1 where a setting that has a
bar reaches 3 %.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

import prism

LIMIT = 0.03
REPEATS = 5
SETTINGS: dict[str, tuple[dict[str, Any], bool]] = {  # options, and whether the bar is theirs
    "early 5:1": ({"schedule": [(5, 1)]}, True),
    "early 3:4,6:2,9:1": ({"schedule": [(3, 4), (6, 2), (9, 1)]}, False),
    "early 5:1, one by one": ({"schedule": [(5, 1)], "batch_size": 1}, False),
    "draft of 3 steps": ({"strategy": "draft", "draft_steps": 3}, False),
    "full": ({"strategy": "full"}, True),
    "a plain call": ({"strategy": "none"}, False),
}


def main() -> int:
    pipe = prism.shapeworld.pipeline()
    pipe.set_progress_bar_config(disable=True)
    judge = prism.Judge.untrained(pipe, tap=4, dim=256)  # what it prefers does not matter here, what it costs does
    prompt = prism.shapeworld.prompts("validation")[0]
    prism.best_of_n(pipe, judge, prompt, n=8, **prism.shapeworld.CALL)  # the first run pays for what is set up once
    print(f"Best-of-8 on ShapeWorld, {torch.get_num_threads()} threads, median of {REPEATS} runs")
    missed = False
    for name, (options, barred) in SETTINGS.items():
        ledgers = [
            prism.best_of_n(pipe, judge, prompt, n=8, seed=seed, **options, **prism.shapeworld.CALL).ledger
            for seed in range(REPEATS)
        ]
        ledger = sorted(ledgers, key=lambda ledger: ledger.overhead_seconds / ledger.seconds)[REPEATS // 2]
        share = ledger.overhead_seconds / ledger.seconds
        missed |= barred and share >= LIMIT
        parts = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in ledger.parts.items())
        bar = f" (bar: {LIMIT:.0%})" if barred else ""
        print(f"{name:24s} overhead {share:6.1%}{bar} of {ledger.seconds:5.2f} s ({parts})")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
