"""The claims of a run: limits that it must reach, and sentences that follow from its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prism import files
from prism.lab.front import sight_sentence
from prism.report import rows as row_types
from prism.report import wording
from prism.shapeworld.generator import ROOT

LEVELS = (899, 699, 499)
ROWS = 0.35  # most denoiser rows, as a share of full Best-of-N's
EARLY, DRAFT = (0.50, 0.40), (0.65, 0.55)  # least share of the oracle's gain, and of its interval's lower end
FIRST = 0.2  # share of the steps by which an early cut must come
OVERHEAD = 0.03


def check(
    comparison: Sequence[row_types.ComparisonRow],
    picks: Sequence[row_types.BestOfNRow],
    early: str,
    draft: str,
    overhead: float | None,
) -> list[row_types.ClaimRow]:
    """The rows "bars" of metrics.json, with "met" None where a claim was not measured, or on too few prompts.

    comparison: "judge_comparison" rows. picks: "best_of_n" rows of the test prompts; `early` and `draft` name those
    that were fixed beforehand. overhead: the sampler's share of a run.
    """
    rows = []
    for t in LEVELS:
        row = next(
            (
                row
                for row in comparison
                if (row["against"], row["t"], row["dimension"], row["set"]) == ("pixel", t, "overall", "test")
            ),
            None,
        )
        interval = None if row is None else row["ci95"]
        bar = f"more accurate than the pixel judge trained on clean videos at t = {t}: interval above zero"
        text = ""
        if row is not None:
            text = f"{wording.points(row['difference'])} points ({wording.points_interval(interval)})"
        rows.append(_bar(bar, text, None if interval is None else interval[0] > 0))
    limits = ((early, "one cut in the first fifth of the steps", EARLY), (draft, "drafts", DRAFT))
    for name, what, (least, low) in limits:
        pick = next((row for row in wording.pooled(picks) if row["name"] == name and row["set"] == "test"), None)
        bar = (
            f"{what}: at least {least:.0%} of the oracle’s gain, its interval’s lower end {low:.0%}, for at most "
            f"{ROWS:.0%} of the denoiser rows"
        )
        if pick is None:
            rows.append(_bar(bar, "", None))
            continue
        share, interval, cost = pick["oracle_share"], pick["oracle_share_ci95"], pick["denoiser_share_of_full"]
        text = f"{wording.percent(share)} ({wording.percent_interval(interval)}) for {wording.percent(cost)}"
        met = None
        if interval is not None and share is not None and cost is not None:
            met = share >= least and interval[0] >= low and cost <= ROWS
        cuts = pick["schedule"]
        if met and cuts:
            met = len(cuts) == 1 and cuts[0][0] <= FIRST * pick["num_inference_steps"]
        rows.append(_bar(bar, f"{text} ({wording.how(pick)})", met))
    bar = f"the sampler’s overhead (neither denoiser, head nor VAE) under {OVERHEAD:.0%} of a run"
    met = None if overhead is None else overhead < OVERHEAD
    rows.append(_bar(bar, "" if overhead is None else wording.percent(overhead), met))
    return rows


def overhead(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> float | None:
    """The largest share, over plans, of their separate runs' time that is spent in neither denoiser, head nor VAE."""
    largest = None
    for name in names:
        runs = [run["ledger"] for record in records for run in record.get("alone", {}).get(name, [])]
        seconds = sum(run["seconds"] for run in runs)
        if seconds:
            rest = seconds - sum(run["parts"][part] for run in runs for part in ("denoiser", "head", "vae"))
            largest = max(largest or 0.0, rest / seconds)
    return largest


def _bar(bar: str, reached: str, met: bool | None) -> row_types.ClaimRow:
    return {"bar": bar, "reached": reached or wording.MISSING, "met": met}


FULL_RUN = ROOT / "full-run" / "summary.json"  # of docs/evidence; docs/picture.py writes it
STRATEGIES = ("early", "draft", "full")
LIMITS = (
    "It does not show that the same numbers hold for large models and human raters: the model, its world and the "
    "referee are small, and the referee is a program. Intervals are over prompts: they do not say what another "
    "training of the judges would have changed. Nor does it show what makes the query look where it looks; a map of "
    "attention is what was read, not why.",
    "Schedules, noise levels and the settings of heads and pixel judges were fixed on validation prompts before the "
    "test prompts were looked at. The head and the pixel judges that ship come from a full run, and saw more prompts "
    "than a short demo trains on. All candidates are computed once per prompt, and every strategy then picks from the "
    "same scores; on some prompts each strategy was also run by itself, and costs and times come from these.",
)


def notes(metrics: Mapping[str, Any]) -> list[str]:
    """Paragraphs on what a demo's numbers show, do not show, and, where an interval includes chance, leave open."""
    sentences = [_of_judge(metrics), sight_sentence(metrics.get("sight", [])), _of_pick(metrics), _of_pixels(metrics)]
    return [" ".join(sentence for sentence in sentences if sentence), *LIMITS]


def summary(metrics: Mapping[str, Any]) -> row_types.Summary:
    """The main numbers of a run on test prompts, each with its name, value and interval."""
    rows: list[row_types.SummaryRow] = [
        {"what": f"accuracy at t = {row['t']}", "value": row["without_ties"], "ci95": row["without_ties_ci95"]}
        for row in _accuracies(metrics)
    ]
    picks = [row for name in STRATEGIES for row in _picks(metrics) if row["name"] == name]
    rows += [
        {"what": f"{row['name']}: share of the oracle’s gain", "value": row["oracle_share"],
         "ci95": row["oracle_share_ci95"]}
        for row in picks
    ]  # fmt: skip
    judges = [len(row.get("head_seeds") or [0]) for row in picks[:1]]
    return {"prompts": picks[0]["prompts"] if picks else 0, "judges": sum(judges), "rows": rows}


def beside(metrics: Mapping[str, Any]) -> row_types.Beside:
    """A run's main numbers beside those of the full run that the documentation reports (docs/evidence)."""
    this_run, full = summary(metrics), files.read_json(FULL_RUN)
    by_name: dict[str, row_types.SummaryRow] = {row["what"]: row for row in full["rows"]}
    rows: list[row_types.BesideRow] = [
        {**row, "full": by_name[row["what"]]["value"], "full_ci95": by_name[row["what"]]["ci95"]}
        for row in this_run["rows"] if row["what"] in by_name
    ]  # fmt: skip
    return {**this_run, "rows": rows, "full_prompts": full["prompts"], "full_judges": full["judges"]}


def _accuracies(metrics: Mapping[str, Any]) -> list[row_types.AccuracyRow]:
    shown: list[row_types.AccuracyRow] = wording.pooled(metrics["accuracy"])
    rows = [row for row in shown
            if (row["judge"], row["set"], row["dimension"]) == ("prism", "test", "overall")]  # fmt: skip
    return [row for t in LEVELS for row in rows if row["t"] == t and row["without_ties"] is not None]


def _picks(metrics: Mapping[str, Any]) -> list[row_types.BestOfNRow]:
    rows: list[row_types.BestOfNRow] = wording.pooled(metrics["best_of_n"])
    return [row for row in rows if row["set"] == "test" and wording.is_main(row)]


def _of_judge(metrics: Mapping[str, Any]) -> str:
    rows = _accuracies(metrics)
    better = [row for row in rows if row["without_ties_ci95"] and row["without_ties_ci95"][0] > 0.5]
    worse = [row for row in rows if row["without_ties_ci95"] and row["without_ties_ci95"][1] < 0.5]
    open_ = [row for row in rows if row not in better and row not in worse]
    sentences = []
    if better:
        sentences.append(
            f"The judge orders noisy latents of prompts it never saw better than chance at {_levels(better)}."
        )
    if worse:
        sentences.append(f"At {_levels(worse)} it orders them worse than chance.")
    if open_:
        sentences.append(
            f"At {_levels(open_)} the interval includes 50 %, or there are too few prompts for one: whether the judge "
            "sees anything there, this run does not show."
        )
    return " ".join(sentences)


def _of_pick(metrics: Mapping[str, Any]) -> str:
    rows = {row["name"]: row for row in _picks(metrics)}
    if "early" not in rows:
        return ""
    early, interval = rows["early"], rows["early"]["referee_gain_ci95"]
    what = f"The strategy early ({wording.how(early)})"
    if not wording.clear(interval):
        return (
            f"{what} gains {wording.signed(early['referee_gain'])} over a random pick, and the interval includes zero, "
            "or there are too few prompts for one: that it picks better than chance, this run does not show."
        )
    if (early["referee_gain"] or 0.0) < 0:
        return f"{what} picks worse than chance in this run."
    full, share = rows.get("full"), wording.percent(early["oracle_share"], 0)
    of_full = "" if full is None else f"; full, which finishes all, reaches {wording.percent(full['oracle_share'], 0)}"
    return (
        f"{what} picks better than chance: {share} of what a perfect pick, the oracle’s, would gain, for "
        f"{wording.percent(early['denoiser_share_of_full'], 0)} of full Best-of-{early['n']}’s denoiser rows{of_full}."
    )


def _of_pixels(metrics: Mapping[str, Any]) -> str:
    every: list[row_types.ComparisonRow] = metrics.get("judge_comparison", [])
    rows = [row for row in every
            if (row["set"], row["dimension"]) == ("test", "overall") and row["t"] in (*LEVELS, 0)]  # fmt: skip
    sentences = []
    for name in dict.fromkeys(row["against"] for row in rows):
        against = [row for row in rows if row["against"] == name]
        clear = [row for row in against if wording.clear(row["ci95"])]
        verdicts = [
            (f"more accurate at {_levels(some)}" if better else f"less accurate at {_levels(some)}")
            for better in (True, False)
            if (some := [row for row in clear if (row["difference"] > 0) == better])
        ]
        if rest := [row for row in against if row not in clear]:
            verdicts.append(f"not told apart at {_levels(rest)}")
        sentences.append(f"Against the judge {name}: {', '.join(verdicts)}.")
    return " ".join(sentences)


def _levels(rows: Sequence[row_types.AccuracyRow] | Sequence[row_types.ComparisonRow]) -> str:
    return "t = " + ", ".join(f"{row['t']:g}" for row in sorted(rows, key=lambda row: -row["t"]))
