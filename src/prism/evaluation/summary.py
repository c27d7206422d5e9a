"""The figures of a measurement: accuracy by noise level, and per pair of generators."""

from __future__ import annotations

import math

import numpy as np

from prism.errors import choice
from prism.evaluation.accuracy import METHODS, pairwise_accuracy
from prism.evaluation.intervals import prompt_interval, video_interval
from prism.evaluation.measurement import Block, Measurement
from prism.judge.objective import tie_margin
from prism.report.rows import AccuracyRow, GeneratorRow


def accuracy_rows(measured: Measurement, method: str = "exact", over_videos: bool = False) -> list[AccuracyRow]:
    """The "accuracy" rows of metrics.json, see `prism.evaluation.measure`.

    method: "videoalign" adds with_ties_videoalign, the figure of VideoGen-RewardBench's public evaluator on the same
        scores in the store's order.
    over_videos: add without_ties_videos_ci95, the `video_interval`, where it exists.
    """
    choice("The method", method, METHODS)
    about, seed = measured.about, measured.settings["seed"]
    log_snr = dict(zip(about["levels"], about["log_snr"]))
    rows: list[AccuracyRow] = []
    for block in measured.blocks:
        y, m, decided = block.labels, block.margins, block.decided
        tuned = pairwise_accuracy(y, m)
        tuning = measured.tuning_blocks.get((block.t, block.dimension))
        validated = None
        if tuning is not None:
            threshold = pairwise_accuracy(tuning.labels, tuning.margins).threshold
            validated = pairwise_accuracy(y, m, threshold=threshold).with_ties
        row: AccuracyRow = {
            "judge": measured.judge,
            "head_seed": about["head_seed"],
            "source": about["source"],
            "t": measured.level(block.t),
            "log_snr": log_snr[block.t],
            "set": measured.settings["split"],
            "dimension": block.dimension,
            "without_ties": _number(tuned.without_ties),
            "without_ties_ci95": prompt_interval(block.right[decided], block.prompts[decided], seed=seed),
            "with_ties": _number(tuned.with_ties),
            "with_ties_validation_threshold": None if validated is None else _number(validated),
            "with_ties_model_rule": _number(pairwise_accuracy(y, m, threshold=tie_margin(about["eta"])).with_ties),
            "pairs": len(y),
            "prompts": len(set(block.prompts.tolist())),
            "decided_pairs": int(decided.sum()),
            "decided_prompts": len(set(block.prompts[decided].tolist())),
        }
        if over_videos:
            interval = video_interval(block.right[decided], *(names[decided] for names in block.videos))
            if interval is not None:
                row["without_ties_videos_ci95"] = interval
        if method == "videoalign":
            row["with_ties_videoalign"] = _number(pairwise_accuracy(y, m, method=method).with_ties)
        rows.append(row)
    return rows


def generator_rows(measured: Measurement) -> list[GeneratorRow]:
    """The "generators" rows of metrics.json: one per noise level, dimension and pair of generators.

    There are no rows where the store names fewer than two generators. Shares are of decided pairs; a margin of zero
    counts as half a preference.
    """
    rows: list[GeneratorRow] = []
    for block in measured.blocks:
        a, b = (np.array([model or "" for model in side], dtype=str) for side in block.models)
        named = (a != "") & (b != "")
        first, second = np.minimum(a.astype(object), b.astype(object)), np.maximum(a.astype(object), b.astype(object))
        names = sorted(set(zip(first[named].tolist(), second[named].tolist())))
        if len({model for pair in names for model in pair}) < 2:
            continue
        rows += [
            _of_generators(measured, block, *pair, named & (first == pair[0]) & (second == pair[1])) for pair in names
        ]
    return rows


def _of_generators(measured: Measurement, block: Block, first: str, second: str, mask: np.ndarray) -> GeneratorRow:
    counted, seed = mask & block.decided, measured.settings["seed"]
    prompts, right = block.prompts[counted], block.right[counted]
    row: GeneratorRow = {
        "judge": measured.judge,
        "set": measured.settings["split"],
        "t": measured.level(block.t),
        "dimension": block.dimension,
        "model_a": first,
        "model_b": second,
        "pairs": int(mask.sum()),
        "decided_pairs": int(counted.sum()),
        "prompts": len(set(prompts.tolist())),
        "without_ties": float(right.mean()) if len(right) else None,
        "without_ties_ci95": prompt_interval(right, prompts, seed=seed),
        "judge_share": None,
        "people_share": None,
        "difference": None,
        "difference_ci95": None,
    }
    if first != second and len(right):
        side = np.where(block.models[0][counted] == first, 1, -1)
        people = (side * block.labels[counted] > 0).astype(np.float64)
        judge = (np.sign(side * block.margins[counted]) + 1) / 2
        row |= {
            "judge_share": float(judge.mean()),
            "people_share": float(people.mean()),
            "difference": float((judge - people).mean()),
            "difference_ci95": prompt_interval(judge - people, prompts, seed=seed),
        }
    return row


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
