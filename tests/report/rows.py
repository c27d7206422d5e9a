"""Plausible rows of metrics.json."""

from __future__ import annotations

from typing import Any

LEVELS = (989, 899, 699, 299, 0)
VALUES = (0.52, 0.64, 0.74, 0.73, 0.66)


def accuracy(**changes: Any) -> list[dict[str, Any]]:
    rows = []
    for dimension, offset in (("VQ", -0.03), ("overall", 0.0)):
        for t, value in zip(LEVELS, VALUES):
            row = {
                "judge": "prism",
                "head_seed": 0,
                "source": "renoised",
                "t": t,
                "set": "test",
                "dimension": dimension,
                "without_ties": value + offset,
                "without_ties_ci95": [value + offset - 0.04, value + offset + 0.05],
                "with_ties": value - 0.08,
                "with_ties_validation_threshold": value - 0.09,
                "with_ties_model_rule": value - 0.1,
                "pairs": 1203,
                "prompts": 60,
                "decided_pairs": 871,
                "decided_prompts": 58,
            }
            rows.append({**row, **changes})
    return rows


def pick(strategy: str, gain: float | None, share: float, **changes: Any) -> dict[str, Any]:
    row = {
        "judge": "prism",
        "head_seed": 0,
        "strategy": strategy,
        "n": 8,
        "num_inference_steps": 20,
        "guidance_scale": 2.5,
        "schedule": None,
        "draft_steps": None,
        "judge_at": None,
        "set": "test",
        "prompts": 60,
        "referee_gain": gain,
        "referee_gain_ci95": None if gain is None else [gain - 0.13, gain + 0.13],
        "oracle_share": None if gain is None else gain / 1.3,
        "oracle_share_ci95": None if gain is None else [gain / 1.3 - 0.1, gain / 1.3 + 0.1],
        "denoiser_rows": 19200 * share,
        "denoiser_share_of_full": share,
        "vae_decodes": 60,
        "head_calls": 480,
        "seconds": 41.0,
    }
    return {**row, **changes}


def picks() -> list[dict[str, Any]]:
    return [
        pick("none", -0.02, 0.125, judge=None, head_seed=None),
        pick("random", 0.03, 0.125, judge=None, head_seed=None),
        pick("early", 0.62, 0.33, schedule=[[5, 1]]),
        pick("draft", 0.83, 0.32, draft_steps=4, judge_at=700),
        pick("full", 0.95, 1.0, judge_at=700),
        pick("oracle", 1.3, 1.0, judge="referee", vae_decodes=480),
    ]


def evaluation() -> dict[str, list[dict[str, Any]]]:
    """The rows that `prism eval` writes beside accuracy, at two levels and in two dimensions."""
    found: dict[str, list[dict[str, Any]]] = {"generators": [], "reliability": [], "biases": []}
    for t in (899, 699):
        for dimension in ("VQ", "overall"):
            where = {"judge": "prism", "set": "test", "t": t, "dimension": dimension}
            shares = {"judge_share": 0.61, "people_share": 0.52, "difference": 0.09, "difference_ci95": [0.02, 0.16]}
            of_pair = {"pairs": 90, "decided_pairs": 71, "prompts": 40, "without_ties": 0.7}
            for models in (("sora", "wan"), ("wan", "wan")):
                row = {**where, "model_a": models[0], "model_b": models[1], **of_pair, **shares}
                row["without_ties_ci95"] = [0.61, 0.79]
                found["generators"].append(row if models[0] != models[1] else {**row, **dict.fromkeys(shares)})
            reliability = {"temperature": 1.0, "eta": 5.0, "pairs": 90, "soft_pairs": 0, "nll": 1.02}
            reliability |= {"nll_ci95": [0.9, 1.1], "nll_of_shares": 0.95, "calibration_error": 0.08}
            reliability |= {
                "calibration_error_by_chance": 0.03,
                "tie_calibration_error": 0.2,
                "curve": [[0.1, 0.2, 18]],
            }
            curves = {"curve": [[0.1, 0.2, 18]], "tie_curve": [[0.6, 0.2, 9]]}
            refitted = {"temperature": 2.0, "eta": 1.5, "nll": 0.87, "calibration_error": 0.041}
            found["reliability"].append({**where, **reliability, **curves, "refitted": refitted})
            probe = {"probe": "brightness", "unit": "mean luma", "pairs": 66, "prompts": 39, **shares}
            found["biases"].append({**where, **probe, "judge_share_ci95": [0.5, 0.7], "people_share_ci95": None})
    swap = {"judge": "prism", "set": "test", "t": 699, "pairs": 32, "flipped": 0, "largest_difference": 0.0}
    against = {"judge": "runs/a", "against": "runs/b", "set": "test", "t": 699, "dimension": "overall"}
    against |= {"difference": 0.031, "ci95": [-0.01, 0.07], "pairs": 71, "prompts": 40}
    tested = {"better": 12, "worse": 9, "mcnemar_p": 0.6636}
    return {**found, "swap": [swap], "judge_comparison": [{**against, **tested}]}
