"""Bias probes: how often a judge prefers the longer, brighter, ... of two clips, compared with how often people do, and
a test that the order of the two does not matter.

People may well prefer brighter clips; a judge is biased where it does so more often than they do, on the same pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prism.evaluation.evaluator import Scorer, Video, batches_of, noised, scores_of
from prism.evaluation.facts import PROBES
from prism.evaluation.intervals import prompt_interval
from prism.evaluation.measurement import Measurement
from prism.preference import LatentStore
from prism.report.rows import BiasRow, SwapRow
from prism.team import in_batches

SWAPPED = 32
"""Pairs of the swap test."""
DIFFERENT = 0.05
"""Share of the larger value by which two clips must differ to count in a probe."""


def bias_rows(measured: Measurement) -> list[BiasRow]:
    """The "biases" rows of metrics.json: one per noise level, dimension and probe with decided pairs to count.

    The judge's share and people's are of the same decided pairs, of clips that differ by more than `DIFFERENT`. A
    margin of zero counts as half a preference.
    """
    rows: list[BiasRow] = []
    seed, units = measured.settings["seed"], measured.about.get("units", {})
    for block in measured.blocks:
        for probe in PROBES:
            a, b = (block.numbers[f"{probe}_{side}"] for side in "ab")
            counted = block.decided & different(a, b)
            if not counted.any():
                continue
            side = np.sign(a - b)[counted]  # 1: A is the longer
            people = (side * block.labels[counted] > 0).astype(np.float64)
            judge = (np.sign(side * block.margins[counted]) + 1) / 2
            prompts = block.prompts[counted]
            rows.append(
                {
                    "judge": measured.judge,
                    "set": measured.settings["split"],
                    "t": measured.level(block.t),
                    "dimension": block.dimension,
                    "probe": probe,
                    "unit": units.get(probe, ""),
                    "pairs": int(counted.sum()),
                    "prompts": len(set(prompts.tolist())),
                    "judge_share": float(judge.mean()),
                    "judge_share_ci95": prompt_interval(judge, prompts, seed=seed),
                    "people_share": float(people.mean()),
                    "people_share_ci95": prompt_interval(people, prompts, seed=seed),
                    "difference": float((judge - people).mean()),
                    "difference_ci95": prompt_interval(judge - people, prompts, seed=seed),
                }
            )
    return rows


def different(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n,) bool: neither number is NaN, and they differ by more than `DIFFERENT` of the larger one."""
    with np.errstate(invalid="ignore"):
        mask: np.ndarray = np.abs(a - b) > DIFFERENT * np.maximum(np.abs(a), np.abs(b))
    return mask


def swap_test(judge: Scorer, store: LatentStore, split: str = "test", t: float = 699, seed: int = 0) -> SwapRow:
    """Score pairs as (A, B), and again as (B, A): the "swap" row of metrics.json.

    The margin of a judge that scores each video by itself changes its sign alone; this tests that it does, on the
    split's first `SWAPPED` pairs and one noise draw, with both videos in one batch where their shapes allow it.
    """
    rows = store.pairs.filter([each == split for each in store.pairs["split"].to_pylist()]).slice(0, SWAPPED)
    margins = [
        np.stack([_margin(judge, store, row[a], row[b], row["prompt"], t, seed) for row in rows.to_pylist()])
        for a, b in (("video_a", "video_b"), ("video_b", "video_a"))
    ]
    return {
        "judge": judge.name,
        "set": split,
        "t": t,
        "pairs": len(rows),
        "flipped": int((np.sign(margins[0]) != -np.sign(margins[1])).any(1).sum()),
        "largest_difference": float(np.abs(margins[0] + margins[1]).max()),
    }


def _margin(judge: Scorer, store: LatentStore, first: str, second: str, prompt: str, t: float, seed: int) -> np.ndarray:
    """(num_dimensions,) score of the first video minus that of the second, in this order in their batch."""
    scores: list[np.ndarray] = []
    for batch in batches_of(store, [(first, prompt), (second, prompt)], 2):

        def work(part: Sequence[Video]) -> None:
            videos = [video for video, _ in part]
            noisy = noised(judge.backbone, store.latents(videos), videos, t, 0, seed)
            scores.extend(scores_of(judge, store, part, noisy, t))

        in_batches(batch, 2, work, "swapping")
    margin: np.ndarray = scores[0] - scores[1]
    return margin
