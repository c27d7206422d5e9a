"""Compare Best-of-N strategies on the same candidates: what each pick is worth by a referee, and what finding it
cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prism.evaluation import prompt_interval
from prism.experiments.contest import JUDGED

Record = Mapping[str, Any]  # one prompt, as `record` makes it
Plans = Mapping[str, Mapping[str, Any]]


def rows(
    records: Sequence[Record],
    plans: Plans,
    head_seeds: Sequence[int],
    call: Mapping[str, Any],
    which: str,
    seed: int,
    measured: Sequence[Record] | None = None,
) -> list[dict[str, Any]]:
    """The "best_of_n" rows of metrics.json: one per plan and judge, and where there are several judges one for all of
    them first, whose "head_seed" is None and whose gains are the judges' mean.

    records: one per prompt: "prompt", "values" {"overall": (n,)}, "picks" {plan: a pick per judge}, and, where plans
    were run by themselves, "alone" {plan: [{"ledger"}, one per judge]}. Costs are those runs' means, and seconds their
    median, times the number of prompts. A gain is the pick's score over the mean of its prompt's candidates, which is
    what a random pick gets on average, in units of the pooled within-prompt standard deviation of the referee's scores;
    intervals are 95 % bootstrap intervals over prompts. `full` must be among the plans: costs are
    given as shares of it.
    measured: records to take costs from, where it is not these.
    """
    values, prompts = _values(records), [record["prompt"] for record in records]
    best = values.max(1) - values.mean(1)
    spread = float(np.sqrt(values.var(1, ddof=1).mean()))
    ledgers = _ledgers(records if measured is None else measured)
    everything = _mean(ledgers["full"], "denoiser_rows")
    table = []
    for name, plan in plans.items():
        judged = plan["strategy"] in JUDGED
        gains = _gains(records, values, name)
        several: list[tuple[int | None, np.ndarray]] = list(zip(head_seeds, gains)) if judged else [(None, gains[0])]
        if len(several) > 1:
            several.insert(0, (None, gains.mean(0)))
        for head_seed, gain in several:
            sums = columns(gain, values)
            table.append(
                {
                    "judge": "prism" if judged else "referee" if plan["strategy"] == "oracle" else None,
                    "head_seed": head_seed,
                    **({"head_seeds": list(head_seeds)} if judged and head_seed is None else {}),
                    "name": name,
                    **_settings(plan, call),
                    "n": values.shape[1],
                    "set": which,
                    "prompts": len(records),
                    "referee_score": float(values.mean() + gain.mean()),
                    "referee_gain": float(gain.mean() / spread),
                    "referee_gain_ci95": prompt_interval(sums, prompts, in_spreads, seed),
                    "oracle_share": float(gain.mean() / best.mean()),
                    "oracle_share_ci95": prompt_interval(sums, prompts, of_oracle, seed),
                    "denoiser_rows": _mean(ledgers[name], "denoiser_rows") * len(records),
                    "denoiser_share_of_full": _mean(ledgers[name], "denoiser_rows") / everything,
                    "vae_decodes": round(_mean(ledgers[name], "vae_decodes") * len(records)),
                    "head_calls": round(_mean(ledgers[name], "head_calls") * len(records)),
                    "seconds": float(np.median([ledger["seconds"] for ledger in ledgers[name]])) * len(records),
                    "runs_timed": len(ledgers[name]),
                }
            )
    return table


def agreement(records: Sequence[Record]) -> dict[str, Any]:
    """How the runs of plans by themselves compare with what all plans share: how many there were, how many picked the
    same candidate, and the largest difference of a score.
    """
    pairs = [
        (run, record["picks"][name][k])
        for record in records
        for name, runs in record.get("alone", {}).items()
        for k, run in enumerate(runs)
    ]
    return {
        "prompts": sum(bool(record.get("alone")) for record in records),
        "runs": len(pairs),
        "same_pick": sum(run["index"] == shared for run, shared in pairs),
        "largest_difference": max((run["off"] for run, _ in pairs), default=0.0),
    }


def _settings(plan: Mapping[str, Any], call: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "strategy": plan["strategy"],
        "num_inference_steps": call["num_inference_steps"],
        "guidance_scale": call["guidance_scale"],
        "schedule": [list(cut) for cut in plan["schedule"]] if "schedule" in plan else None,
        "draft_steps": plan.get("draft_steps"),
        "judge_at": plan.get("judge_at"),
        "num_draws": plan.get("num_draws"),
    }


def _values(records: Sequence[Record]) -> np.ndarray:
    return np.array([record["values"]["overall"] for record in records])  # (prompts, n)


def _gains(records: Sequence[Record], values: np.ndarray, name: str) -> np.ndarray:
    """(judges, prompts): the picks' scores over their prompts' means."""
    picks = np.array([record["picks"][name] for record in records]).T
    return values[np.arange(len(values)), picks] - values.mean(1)


def _ledgers(records: Sequence[Record]) -> dict[str, list[Mapping[str, Any]]]:
    """Plan -> the ledgers of its runs by itself."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        for name, runs in record.get("alone", {}).items():
            found.setdefault(name, []).extend(run["ledger"] for run in runs)
    return found


def _mean(ledgers: Sequence[Mapping[str, Any]], column: str) -> float:
    return float(np.mean([ledger[column] for ledger in ledgers]))


def columns(gain: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(prompts, 4), what `in_spreads` and `of_oracle` take sums of, from gains (prompts,) and values (prompts, n)."""
    return np.stack([gain, values.var(1, ddof=1), values.max(1) - values.mean(1), np.ones(len(gain))], 1)


def in_spreads(sums: np.ndarray) -> np.ndarray:
    """Mean gain in pooled within-prompt standard deviations."""
    return sums[:, 0] / np.sqrt(sums[:, 1] * sums[:, 3])


def of_oracle(sums: np.ndarray) -> np.ndarray:
    """Mean gain as a share of what the best candidates gain."""
    return sums[:, 0] / sums[:, 2]
