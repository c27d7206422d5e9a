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
