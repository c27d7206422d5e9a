"""Compare Best-of-N strategies on the same candidates: what each pick is worth by a referee, and what finding it
cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from prism.evaluation import clustered_bootstrap
from prism.judge import Judge
from prism.sampling import best_of_n
from prism.sampling.best_of_n import BestOfNResult

Referee = Callable[[Any, str], float]  # (video (T, H, W, 3) in [0, 1], prompt) -> score


@dataclass
class Comparison:
    """For each prompt: the referee's score of every candidate, and each strategy's result."""

    prompts: list[str] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)  # (n,) each
    results: dict[str, list[BestOfNResult]] = field(default_factory=dict)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)


def compare(
    judge: Judge,
    referee: Referee,
    prompts: Sequence[str],
    strategies: Mapping[str, Mapping[str, Any]],
    call: Mapping[str, Any],
    n: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    """Run every strategy on the same n seeds of each prompt, for real.

    strategies: name of the row -> arguments of `best_of_n` (`strategy` among them). The strategy `oracle` always runs:
    it finishes and decodes all candidates, and its scores are the measure of every pick. Prompt j has the seeds `seed +
    1000 j + i`."""
    done = Comparison(options={name: dict(options) for name, options in strategies.items()})
    done.options["oracle"] = {"strategy": "oracle"}
    done.results = {name: [] for name in done.options}
    for place, prompt in enumerate(tqdm(prompts, disable=None if progress else True, desc="best of n", unit="prompt")):
        seeds = [seed + 1000 * place + i for i in range(n)]
        best = best_of_n(
            judge.backbone.pipe,
            judge,
            prompt,
            strategy="oracle",
            seeds=seeds,
            oracle=referee,
            keep_latents=True,
            **call,
        )
        done.prompts.append(prompt)
        done.values.append(np.array(best.scores[-1]["scores"]["oracle"]))
        done.results["oracle"].append(best)
        for name, options in strategies.items():
            done.results[name].append(
                best_of_n(judge.backbone.pipe, judge, prompt, seeds=seeds, **{"seed": seed, **options}, **call)
            )
    return done


def rows(done: Comparison, judge: Judge, call: Mapping[str, Any], which: str, seed: int) -> list[dict[str, Any]]:
    """The "best_of_n" rows of metrics.json (DESIGN section 5), one a strategy.

    Gains are in units of the pooled within-prompt standard deviation of the referee's scores; intervals are 95 %
    bootstrap intervals over prompts. `full` must be among the strategies: costs are given as shares of it."""
    values = np.stack(done.values)  # (prompts, n)
    variance = values.var(1, ddof=1)
    spread = float(np.sqrt(variance.mean()))
    best = values.max(1) - values.mean(1)
    everything = sum(result.ledger.denoiser_rows for result in done.results["full"])
    table = []
    for name, results in done.results.items():
        options = done.options[name]
        picks = np.array([result.index for result in results])
        gain = values[np.arange(len(values)), picks] - values.mean(1)
        columns = np.stack([gain, variance, best, np.ones(len(gain))], 1)
        by_judge = options["strategy"] in ("full", "early", "draft")
        table.append(
            {
                "judge": "prism" if by_judge else "referee" if options["strategy"] == "oracle" else None,
                "head_seed": judge.trained_on.get("seed") if by_judge else None,
                "strategy": options["strategy"],
                "n": values.shape[1],
                "num_inference_steps": call["num_inference_steps"],
                "guidance_scale": call["guidance_scale"],
                "schedule": [list(cut) for cut in options["schedule"]] if "schedule" in options else None,
                "draft_steps": options.get("draft_steps"),
                "judge_at": options.get("judge_at"),
                "num_draws": options.get("num_draws"),
                "set": which,
                "prompts": len(done.prompts),
                "referee_gain": float(gain.mean() / spread),
                "referee_gain_ci95": list(clustered_bootstrap(columns, done.prompts, _in_spreads, seed)),
                "oracle_share": float(gain.mean() / best.mean()),
                "oracle_share_ci95": list(clustered_bootstrap(columns, done.prompts, _of_oracle, seed)),
                "denoiser_rows": float(sum(result.ledger.denoiser_rows for result in results)),
                "denoiser_share_of_full": float(sum(result.ledger.denoiser_rows for result in results) / everything),
                "vae_decodes": sum(result.ledger.vae_decodes for result in results),
                "head_calls": sum(result.ledger.head_calls for result in results),
                "seconds": float(sum(result.ledger.seconds for result in results)),
            }
        )
    return table


def over_random(done: Comparison, name: str, seed: int) -> dict[str, Any]:
    """The gain of a strategy over random selection, paired by prompt, in within-prompt standard deviations, with its
    interval.
    """
    values = np.stack(done.values)
    chosen, drawn = ([result.index for result in done.results[which]] for which in (name, "random"))
    line = np.arange(len(values))
    difference = values[line, chosen] - values[line, drawn]
    variance = values.var(1, ddof=1)
    columns = np.stack([difference, variance, difference, np.ones(len(difference))], 1)
    return {
        "strategy": name,
        "gain": float(difference.mean() / np.sqrt(variance.mean())),
        "ci95": list(clustered_bootstrap(columns, done.prompts, _in_spreads, seed)),
    }


def _in_spreads(sums: np.ndarray) -> np.ndarray:
    return sums[:, 0] / np.sqrt(sums[:, 1] * sums[:, 3])


def _of_oracle(sums: np.ndarray) -> np.ndarray:
    return sums[:, 0] / sums[:, 2]
