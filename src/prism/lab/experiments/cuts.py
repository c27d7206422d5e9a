"""The claim that early cuts keep what Best-of-N gains for a fraction of its cost (Table 2, supplement Table 3, Fig. 5).

Every candidate was sampled to the end and scored wherever a plan may look, so that each plan's pick is arithmetic, for
any N; costs are closed forms, and their parts are those of runs by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prism.evaluation import prompt_interval, recorded
from prism.evaluation.recorded import Recorded
from prism.judge import Judge
from prism.judge.joint import JointJudge
from prism.lab import front
from prism.lab.bench import BASE, Bench
from prism.lab.findings import Drawing, Experiment, Finding, Tables, judged
from prism.lab.judges import shipped
from prism.lab.pixel import JointPixelJudge
from prism.report import wording
from prism.report.claim_plots import Line, over_levels
from prism.runs import Parts
from prism.sampling import best_of_n, planner
from prism.sampling.arguments import weights_over
from prism.sampling.looks import DEFAULT_JUDGE_AT
from prism.sampling.plan import Workload
from prism.sampling.planner import Run, Table
from prism.sampling.strategies import Early, Full

SIZES = (3, 5, 10)
DRAWS = 2
EARLY = 0.3
"""The share of a run's steps by which a cut counts as early."""


def run(bench: Bench) -> Finding:
    """Shares of the oracle's gain and costs of every cut, of full Best-of-N and of judges of decoded frames."""
    tables, load = _tables(bench)
    pixels = _pixels(bench)
    oracle = tables[0].oracle
    rows, gains_of = [], {}
    for n in [tables[0].n, *(n for n in reversed(SIZES) if n < tables[0].n)]:
        for name, look, step, plan in _plans(tables[0], n):
            gains = np.mean([planner.gains(table, Run(n, plan), load, bench.seed) for table in tables], 0)
            gains_of[n, name] = gains
            rows.append(_row(name, look, step, n, gains, oracle, planner.cost(Run(n, plan), load), bench.seed))
        for name, scores in pixels.items():
            gains = _finished(tables[0].values, scores, n, bench.seed)
            rows.append(_row(name, "decoded", None, n, gains, oracle, float(n), bench.seed))
        best = _finished(tables[0].values, tables[0].values, n, bench.seed)
        rows.append(_row("oracle", "referee", None, n, best, oracle, float(n), bench.seed))
        rows.append(_row("random", "", None, n, np.zeros(len(oracle)), oracle, 1.0, bench.seed))
    most = tables[0].n
    steps = len(load.calls)
    early = [row for row in rows if row["n"] == most and row["step"] and row["step"] <= EARLY * steps]
    winner = max(early, key=lambda row: float(row["share"]))
    full = next(row for row in rows if row["n"] == most and row["name"] == "full")
    # One cut of each look, fixed beforehand, decides: the best of many would be luck.
    fixed = [row for row in early if (row["look"], row["step"]) in (("ahead", 3), ("now", 4))] or early[-1:]
    kept = [_kept(gains_of[most, row["name"]], gains_of[most, "full"], bench.seed) for row in fixed]
    verdict = judged([half for _, _, half in kept])
    words = "; ".join(
        f"{row['look']} at step {row['step']}: {wording.percent(share, 0)} ({wording.percent_interval(ends, 0)}) of "
        f"what full Best-of-{most} gains, for {row['cost']:.1f} plain samples in place of {full['cost']:.1f}"
        for row, (share, ends, _) in zip(fixed, kept)
    )
    of_oracle = ", ".join(
        f"{row['look']} at step {row['step']} {wording.percent(row['share'], 0)} "
        f"({wording.percent_interval(row['share_ci95'], 0)})" for row in fixed
    )  # fmt: skip
    text = (
        f"Of {most} candidates, {words}. “Most” is more than half, paired. Of the oracle's gain, {of_oracle}, and full "
        f"Best-of-{most} by the same judge {wording.percent(full['share'], 0)} "
        f"({wording.percent_interval(full['share_ci95'], 0)}). The best of all early cuts here is {winner['look']} at "
        f"step {winner['step']} ({wording.percent(winner['share'], 0)}), chosen after the fact. Shares for any N are "
        f"of the best of all {most} candidates. Costs are denoiser rows; what decoding adds for judges of frames is in "
        "the table of parts, in seconds. Both cuts had been seen to do well on these prompts before they "
        "were fixed here."
    )
    judges = _judges(bench)
    if not bench.plays:
        text += (
            f" The candidates of these {len(oracle)} test prompts and their scores, by the head that ships, came with "
            "the package; --scale full makes candidates anew and judges them by heads of its own, and by frames."
        )
    seeds = tuple(judge.trained_on["seed"] for judge in judges)
    return Finding(verdict, words, text, {"best-of-n": rows, "parts": _parts(bench, judges[0])}, len(oracle), seeds)


def _kept(early: np.ndarray, full: np.ndarray, seed: int) -> tuple[float, list[float] | None, list[float] | None]:
    """The share of full Best-of-N's gain that a cut keeps, its interval, and that of the cut less half of full."""
    columns, prompts = np.stack([early, full], 1), np.arange(len(early))
    ends = prompt_interval(columns, prompts, lambda sums: sums[:, 0] / sums[:, 1], seed)
    return float(early.sum() / full.sum()), ends, prompt_interval(early - full / 2, prompts, seed=seed)


def _judges(bench: Bench) -> list[Judge]:
    return bench.judges(BASE) if bench.plays else [shipped(bench.backbone)]


def _tables(bench: Bench) -> tuple[list[Table], Workload]:
    """What planning needs, one table per head; scored by all of them at once, and kept."""
    if not bench.plays:
        scores = Recorded.load_file(front.shipped())
        return [scores.table(front.OVERALL)], scores.load
    judges = bench.judges(BASE)

    def make(path: Path) -> None:
        joint = JointJudge(judges)  # one reading for all heads
        seen = {key for judge in judges for key in judge.trained_on.get("prompt_keys", ())}
        by_prompt, _ = recorded.candidates_of(bench.played, "test", sorted(seen))
        facts = recorded.facts(joint, bench.played, (DEFAULT_JUDGE_AT,), DRAWS, bench.seed, "test")
        scratch = bench.parts.folder / "recorded" / "prompts"
        scratch.mkdir(parents=True, exist_ok=True)
        recorded.score(joint, bench.played, by_prompt, facts, Parts(scratch), bench.batch_size).save(path)

    scores = bench.parts.piece(f"recorded/{BASE}.parquet", make, Recorded.load_file)
    weights = weights_over(judges[0].dimensions, "overall", "judge")
    columns = ({f"{k}/{name}": weight for name, weight in weights.items()} for k in range(len(judges)))
    return [scores.table("overall", each) for each in columns], scores.load


def _plans(table: Table, n: int) -> list[tuple[str, str, int | None, Any]]:
    """Every single cut, now and ahead, and full Best-of-N."""
    plans: list[tuple[str, str, int | None, Any]] = []
    for step in table.steps("now"):
        plans.append((f"cut at {step}", "now", step, Early(schedule=[(step, 1)], look="now")))
    for step in table.steps("ahead"):
        ahead = Early(schedule=[(step, 1)], look="ahead", judge_at=DEFAULT_JUDGE_AT, num_draws=DRAWS)
        plans.append((f"cut at {step}, ahead", "ahead", step, ahead))
    full = Full(judge_at=DEFAULT_JUDGE_AT, num_draws=DRAWS)
    return [*plans, ("full", "finished", None, full)]


def _pixels(bench: Bench) -> dict[str, np.ndarray]:
    """(P, n) scores of the finished candidates by each judge of decoded frames."""
    if not bench.plays or not bench.pixels:
        return {}
    by_prompt, _ = recorded.candidates_of(bench.played, "test", ())
    judge = JointPixelJudge(list(bench.pixels.values()))
    columns = [number for number, name in enumerate(judge.dimensions) if name.endswith("/overall")]

    def made() -> dict[str, Any]:
        scores = []
        for prompt, rows in by_prompt.items():
            latents = bench.played.latents(rows["video"].to_pylist())
            scores.append(judge.score(latents, [prompt] * len(latents), 0.0)[:, columns].T.tolist())
        return {"scores": scores}

    scores = np.array(bench.parts.once("recorded/pixels", made)["scores"])  # (P, judges, n)
    return dict(zip(bench.pixels, scores.swapaxes(0, 1)))


def _finished(values: np.ndarray, scores: np.ndarray, n: int, seed: int) -> np.ndarray:
    """(P,) the mean value of the picks by `scores` over sets of n candidates, less that of a random pick."""
    members = planner.subsets(values.shape[1], n, seed)
    picks = np.take_along_axis(np.broadcast_to(members, (len(values), *members.shape)),
                               scores[:, members].argmax(-1)[..., None], -1)[..., 0]  # fmt: skip
    gains: np.ndarray = np.take_along_axis(values, picks, 1).mean(1) - values.mean(1)
    return gains


def _row(
    name: str, look: str, step: int | None, n: int, gains: np.ndarray, oracle: np.ndarray, cost: float, seed: int
) -> dict[str, Any]:
    columns = np.stack([gains, oracle], 1)
    share = float(gains.sum() / oracle.sum())
    interval = prompt_interval(columns, np.arange(len(gains)), lambda sums: sums[:, 0] / sums[:, 1], seed)
    return {"n": n, "name": name, "look": look, "step": step, "share": share,
            "share_ci95": interval if gains.any() else None, "cost": cost, "prompts": len(gains)}  # fmt: skip


def _parts(bench: Bench, judge: Judge) -> list[dict[str, Any]]:
    """Seconds of whole runs by part, and as shares: a cut, full, and full with every candidate decoded (Fig. 5)."""
    prompts = bench.test_prompts[: bench.scale.timed]
    n = min(bench.scale.n, 8)

    def white(video: Any, prompt: str) -> float:
        return float(np.asarray(video)[0].mean())  # any number: what costs is that all are decoded

    plans: Mapping[str, dict[str, Any]] = {
        "cut at 4": {"strategy": "early", "schedule": [(4, 1)], "look": "now"},
        "cut at 3, ahead": {"strategy": "early", "schedule": [(3, 1)], "look": "ahead"},
        "full": {"strategy": "full"},
        "all decoded": {"strategy": "oracle", "oracle": white},
    }

    def made() -> dict[str, Any]:
        rows = []
        for name, plan in plans.items():
            totals: dict[str, float] = dict.fromkeys(("denoiser", "head", "vae", "rest"), 0.0)
            for prompt in prompts:
                ledger = best_of_n(
                    bench.backbone.pipe, None if "oracle" in plan else judge, prompt, n, seed=bench.seed,
                    **plan, **bench.call,
                ).ledger  # fmt: skip
                for part in ("denoiser", "head", "vae"):
                    totals[part] += ledger.parts[part] / len(prompts)
                totals["rest"] += (ledger.seconds - sum(ledger.parts[p] for p in ("denoiser", "head", "vae"))) / len(
                    prompts
                )
            rows.append({"plan": name, "n": n, **totals, "seconds": sum(totals.values()), "prompts": len(prompts)})
        return {"rows": rows, "threads": torch.get_num_threads()}

    rows: list[dict[str, Any]] = bench.parts.once("recorded/parts", made)["rows"]
    return rows


def draw(tables: Tables) -> Sequence[Drawing]:
    """Share of the oracle's gain against the step of the cut, for the largest N."""
    rows = tables["best-of-n"]
    most, lines = max(row["n"] for row in rows), []
    for look, name in (("ahead", "looking ahead"), ("now", "as it stands")):
        some = [row for row in rows if row["n"] == most and row["look"] == look]
        lines.append(
            Line(name, [row["step"] for row in some], [row["share"] for row in some],
                 [row["share_ci95"] for row in some], look == "ahead")
        )  # fmt: skip
    for name in ("full", "pixel"):
        flat = next((row for row in rows if row["n"] == most and row["name"] == name), None)
        if flat is not None and lines[0].x:
            ends = [min(lines[0].x), max(lines[0].x)]
            lines.append(Line(f"{name}, all finished", ends, [flat["share"]] * 2, [None, None]))
    figure = over_levels(lines, f"step of the cut, Best-of-{most}", chance=0.0, falling=False)
    caption = (
        "Share of the oracle's gain that one cut keeps, against its step, with 95 % intervals over prompts; zero is a "
        "random pick."
    )
    return [Drawing("best-of-n", caption, figure)]


CUTS = Experiment(
    "best-of-n",
    "Early cuts",
    "Dropping losers in the first denoising steps keeps most of what Best-of-N gains for a fraction of its cost.",
    "Table 2, supplement Table 3, Fig. 5",
    run,
    draw,
    kinds=lambda bench: [BASE] if bench.plays else [],
)
