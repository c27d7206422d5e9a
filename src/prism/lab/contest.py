"""All strategies of Best-of-N on the same candidates, and the gain of each pick by a referee."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prism.errors import PrismError, quoted
from prism.evaluation import prompt_interval
from prism.judge.joint import JointJudge
from prism.report.rows import Agreement, BestOfNRow, HeadSeeds, PlanFields
from prism.sampling import best_of_n
from prism.sampling.best_of_n import BestOfNResult
from prism.sampling.plan import Plan, Schedule, Workload
from prism.sampling.strategies import Blind, Early, Full, kind_of, plan_of

Referee = Callable[[Tensor, Sequence[str]], Mapping[str, Tensor]]  # (videos (B, T, H, W, 3), prompts) -> name -> (B,)
TOLERANCE = 0.02  # largest difference by rounding between the scores of a candidate in batches of different sizes


class Contest:
    """The candidates of one prompt, and each judge's scores of them at every step at which a plan needs scores.

    Args:
        joint: the judges.
        referee: measures candidates (`prism.shapeworld.referee.batch`); its "overall" is the score of a pick.
        prompt: one text.
        seeds: of the candidates.
        plans: name -> arguments of `best_of_n`; all plans that judge finished latents or drafts have one `judge_at`.
        call: arguments of the pipeline.
        seed: of the judges' noise and of random picks.

    Attributes: the finished `latents` (n, ...) and their `videos`; `values` name -> (n,), the referee's scores. Overall
    scores by the judges: `final` (judges, n) of the finished latents; `cuts` step -> (judges, n) of the latents there,
    at the noise level `levels` step -> t; `ahead` plan -> step -> (judges, n), where a plan looks ahead; `drafts`
    draft_steps -> (judges, n).
    """

    def __init__(
        self,
        joint: JointJudge,
        referee: Referee,
        prompt: str,
        seeds: Sequence[int],
        plans: Mapping[str, Mapping[str, Any]],
        call: Mapping[str, Any],
        seed: int,
    ) -> None:
        self.joint, self.referee, self.prompt, self.seeds = joint, referee, prompt, tuple(seeds)
        self.plans = dict(plans)
        self.call, self.seed, self.n = dict(call), seed, len(seeds)
        self.cuts: dict[int, np.ndarray] = {}
        self.ahead: dict[str, dict[int, np.ndarray]] = {}
        self.drafts: dict[int, np.ndarray] = {}
        self.levels: dict[int, float] = {}
        self._plans = {name: plan_of(**arguments) for name, arguments in self.plans.items()}
        for name, plan in self._plans.items():
            if plan.parts_at(Workload(self.n, (1,) * self._steps)):
                raise PrismError(
                    f"The candidates of the plan {quoted(name, 60)} part on the way, so that no scores are shared with "
                    "other plans; leave it out of a contest (benchmarks/contest.py compares it)."
                )
        judging_finished = [plans[name] for name, plan in self._plans.items() if plan.looks_at == "finished"]
        arguments: Mapping[str, Any] = judging_finished[0] if judging_finished else {"strategy": Full.strategy}
        full = self._run(arguments, keep_latents=True)
        assert full.candidate_latents is not None
        self.latents = torch.stack([full.candidate_latents[candidate] for candidate in range(self.n)])
        self.final = self._by_judge(full.scores[-1])
        self.videos = joint.backbone.decode(self.latents).cpu()  # the referee runs on the CPU
        self.values = {name: value.numpy() for name, value in referee(self.videos, [prompt] * self.n).items()}
        as_they_stand = [name for name in plans if not self.looks_ahead(name)]
        steps = sorted({step for name in as_they_stand for step, _ in self._cuts_while_sampling(name)})
        if steps:
            shared = {"strategy": Early.strategy, "schedule": self._keep_all(steps), "look": "now"}
            for cut in self._run(shared).scores:
                self.cuts[cut["step"]], self.levels[cut["step"]] = self._by_judge(cut), cut["t"]
        for name in (name for name in plans if self.looks_ahead(name)):
            schedule = self._keep_all([step for step, _ in self._cuts_while_sampling(name)])
            scores = self._run({**plans[name], "schedule": schedule}).scores
            self.ahead[name] = {cut["step"]: self._by_judge(cut) for cut in scores}
        for name, plan in self._plans.items():
            if plan.drafts() and plan.drafts() not in self.drafts:
                self.drafts[plan.drafts()] = self._by_judge(self._run(plans[name]).scores[-1])

    def picks(self, name: str) -> list[int]:
        """The candidate that each judge picks by a plan."""
        plan, judges = self._plans[name], range(len(self.joint.judges))
        if isinstance(plan, Blind):
            return [plan.draw(self.n, 1, self.seed, self.prompt)[0] for _ in judges]
        cuts = self._cuts(name)
        return [pick(cuts, {step: self._shared_scores(name, step, k) for step, _ in cuts}) for k in judges]

    def looks_ahead(self, name: str) -> bool:
        """True for a plan with a cut that judges predicted clean latents."""
        plan = self._plans[name]
        return isinstance(plan, Early) and plan.predicts()

    def readings(self) -> list[dict[str, Any]]:
        """What was judged at the cuts: look, step, noise level t, num_draws, and scores (judges, n)."""
        seen = [("now", step, self.levels[step], 1, scores.tolist()) for step, scores in self.cuts.items()]
        for name, by_step in self.ahead.items():
            plan: Any = self._plans[name]
            seen += [
                (plan.look_at(step), step, plan.judge_at, plan.num_draws, scores.tolist())
                for step, scores in by_step.items()
                if plan.look_at(step) != "now"
            ]
        return [dict(zip(("look", "step", "t", "num_draws", "scores"), each)) for each in seen]

    def play(self, name: str, k: int) -> BestOfNResult:
        """A plan run by itself, by judge k."""
        plan, judge = (
            {"look": "now", **self.plans[name]},
            self.joint.judges[k],
        )  # shared scores are of cuts as they stand
        if self._plans[name].needs_oracle():
            plan["oracle"] = self._value
        return best_of_n(
            judge.backbone.pipe, judge, self.prompt, seeds=self.seeds, **{"seed": self.seed, **plan}, **self.call
        )

    def run_separately(self, name: str, k: int) -> dict[str, Any]:
        """Run a plan by itself, by judge k, and compare its scores with the shared ones.

        Returns:
            {"index": the pick, "ledger": the costs, "off": the largest absolute difference of a score}.

        Raises:
            PrismError: where scores differ by more than rounding.
        """
        plan, result, max_abs_difference = self._plans[name], self.play(name, k), 0.0
        for cut in result.scores:
            shared = self._shared_scores(name, cut["step"], k)[cut["candidates"]]
            separate = np.array(cut["scores"]["oracle" if plan.needs_oracle() else "overall"])
            max_abs_difference = max(max_abs_difference, float(np.abs(separate - shared).max()))
        if max_abs_difference > TOLERANCE:
            raise PrismError(
                f"The strategy {name} run by itself on {self.prompt!r} scores a candidate {max_abs_difference:.2g} "
                "apart from the run that all strategies share; this is a bug in prism."
            )
        return {"index": result.index, "off": max_abs_difference, "ledger": result.ledger.to_dict()}

    def cuts_of(self, name: str, k: int) -> list[dict[str, Any]]:
        """The cuts of an early plan by judge k, in the form of `BestOfNResult.scores`."""
        alive, cuts = list(range(self.n)), []
        for step, keep in self._cuts_while_sampling(name):
            scores = self.cuts[step][k]
            kept = survivors(alive, scores, keep)
            columns = {"overall": [float(scores[candidate]) for candidate in alive]}
            cuts.append({"step": step, "t": self.levels[step], "candidates": alive, "scores": columns, "kept": kept})
            alive = kept
        return cuts

    def _cuts(self, name: str) -> Schedule:
        plan, load = self._plans[name], Workload(self.n, (1,) * self._steps)
        return plan.settled(load).cuts(load)

    def _cuts_while_sampling(self, name: str) -> Schedule:
        """The cuts of a plan that judges during sampling; none for other plans."""
        return self._cuts(name) if self._plans[name].looks_at == "steps" else ()

    @property
    def _steps(self) -> int:
        return self.joint.backbone.num_inference_steps(self.call)

    def _keep_all(self, steps: Sequence[int]) -> list[tuple[int, int]]:
        """Cuts that judge all candidates at each step."""
        return [(step, self.n) for step in steps[:-1]] + [(steps[-1], 1)]

    def _shared_scores(self, name: str, step: int, k: int) -> np.ndarray:
        """The scores (n,) of all candidates that a plan cuts by at a step, for judge k."""
        plan: Plan = self._plans[name]
        if plan.looks_at == "steps":
            return self.ahead.get(name, self.cuts)[step][k]
        if plan.looks_at == "drafts":
            return self.drafts[plan.drafts()][k]
        return self.values["overall"] if plan.needs_oracle() else self.final[k]

    def _value(self, video: Any, prompt: str) -> float:
        return float(self.referee(torch.as_tensor(video)[None], [prompt])["overall"][0])

    def _run(self, plan: Mapping[str, Any], **options: Any) -> BestOfNResult:
        arguments = {"seed": self.seed, "select_by": "0/overall", **plan, **options}
        return best_of_n(self.joint.backbone.pipe, self.joint, self.prompt, seeds=self.seeds, **arguments, **self.call)

    def _by_judge(self, cut: Mapping[str, Any]) -> np.ndarray:
        return np.array([cut["scores"][f"{k}/overall"] for k in range(len(self.joint.judges))])


def survivors(alive: Sequence[int], scores: np.ndarray, keep: int) -> list[int]:
    """The best `keep` of the candidates `alive` by score (n,), in rising order; of equal scores the first."""
    return sorted(sorted(alive, key=lambda candidate: (-scores[candidate], candidate))[:keep])


def pick(cuts: Sequence[tuple[int, int]], scores: Mapping[int, np.ndarray]) -> int:
    """The candidate that is left after the cuts. scores: step -> (n,), of all candidates."""
    alive = list(range(len(next(iter(scores.values())))))
    for step, keep in cuts:
        alive = survivors(alive, scores[step], keep)
    return alive[0]


Record = Mapping[str, Any]  # one prompt, as `prism.lab.records.record` makes it
Plans = Mapping[str, Mapping[str, Any]]


def rows(
    records: Sequence[Record],
    plans: Plans,
    head_seeds: Sequence[int],
    call: Mapping[str, Any],
    which: str,
    seed: int,
    measured: Sequence[Record] | None = None,
) -> list[BestOfNRow]:
    """The "best_of_n" rows of metrics.json: one per plan and judge.

    Where there are several judges, the first row of each plan is their mean, with "head_seed" None. A gain is the
    pick's score minus the mean of its prompt's candidates (the expectation of a random pick), in units of the pooled
    within-prompt standard deviation of the referee's scores. Costs are means over the separate runs, and seconds their
    median, times the number of prompts. Intervals are 95 % bootstrap intervals over prompts.

    Args:
        records: one per prompt: "prompt", "values" {"overall": (n,)}, "picks" {plan: a pick per judge}, and, where
            plans were run separately, "alone" {plan: [{"ledger"}, one per judge]}.
        plans: arguments of `best_of_n` by name; "full" must be among them, as costs are also given as shares of it.
        head_seeds: of the judges. call: the pipeline's arguments. which: the set of prompts. seed: of the intervals.
        measured: the records whose separate runs give the costs; None: `records`.
    """
    values, prompts = _values(records), [record["prompt"] for record in records]
    best = values.max(1) - values.mean(1)
    spread = float(np.sqrt(values.var(1, ddof=1).mean()))
    ledgers = _ledgers(records if measured is None else measured)
    everything = _mean(ledgers["full"], "denoiser_rows")
    table: list[BestOfNRow] = []
    for name, plan in plans.items():
        kind = kind_of(plan["strategy"])
        judged = kind.needs_judge()
        gains = _gains(records, values, name)
        several: list[tuple[int | None, np.ndarray]] = list(zip(head_seeds, gains)) if judged else [(None, gains[0])]
        if len(several) > 1:
            several.insert(0, (None, gains.mean(0)))
        for head_seed, gain in several:
            sums = columns(gain, values)
            table.append(
                {
                    "judge": "prism" if judged else "referee" if kind.needs_oracle() else None,
                    "head_seed": head_seed,
                    **(HeadSeeds(head_seeds=list(head_seeds)) if judged and head_seed is None else HeadSeeds()),
                    "name": name,
                    **_settings(plan, call),
                    "num_draws": plan.get("num_draws"),
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


def agreement(records: Sequence[Record]) -> Agreement:
    """Agreement of separate runs of plans with the shared run of all: the number of separate runs, the number of those
    that picked the same candidate, and the largest difference of a score.
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


def _settings(plan: Mapping[str, Any], call: Mapping[str, Any]) -> PlanFields:
    fields: PlanFields = {
        "strategy": plan["strategy"],
        "num_inference_steps": call["num_inference_steps"],
        "guidance_scale": call["guidance_scale"],
        "schedule": [list(cut) for cut in plan["schedule"]] if "schedule" in plan else None,
        "draft_steps": plan.get("draft_steps"),
        "judge_at": plan.get("judge_at"),
    }
    if "look" in plan:
        fields["look"] = plan["look"]
    return fields


def _values(records: Sequence[Record]) -> np.ndarray:
    return np.array([record["values"]["overall"] for record in records])  # (prompts, n)


def _gains(records: Sequence[Record], values: np.ndarray, name: str) -> np.ndarray:
    """(judges, prompts): the picks' scores minus the mean of their prompt's candidates."""
    picks = np.array([record["picks"][name] for record in records]).T
    return values[np.arange(len(values)), picks] - values.mean(1)


def _ledgers(records: Sequence[Record]) -> dict[str, list[Mapping[str, Any]]]:
    """The ledgers of a plan's separate runs, by plan."""
    ledgers: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        for name, runs in record.get("alone", {}).items():
            ledgers.setdefault(name, []).extend(run["ledger"] for run in runs)
    return ledgers


def _mean(ledgers: Sequence[Mapping[str, Any]], column: str) -> float:
    return float(np.mean([ledger[column] for ledger in ledgers]))


def columns(gain: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The columns (prompts, 4) whose sums `in_spreads` and `of_oracle` take, from gains (prompts,) and values
    (prompts, n)."""
    return np.stack([gain, values.var(1, ddof=1), values.max(1) - values.mean(1), np.ones(len(gain))], 1)


def in_spreads(sums: np.ndarray) -> np.ndarray:
    """Mean gain in pooled within-prompt standard deviations."""
    return sums[:, 0] / np.sqrt(sums[:, 1] * sums[:, 3])


def of_oracle(sums: np.ndarray) -> np.ndarray:
    """Mean gain as a share of the best candidates' mean gain."""
    return sums[:, 0] / sums[:, 2]
