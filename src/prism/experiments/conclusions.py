"""Sentences that follow from a demo's numbers, and the full run's numbers beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prism import files
from prism.experiments.bars import LEVELS
from prism.report import wording
from prism.shapeworld.assets import ROOT

Row = Mapping[str, Any]
FULL_RUN = ROOT / "full-run" / "summary.json"  # of docs/evidence; docs/picture.py writes it
STRATEGIES = ("early", "draft", "full")
LIMITS = (
    "It does not show that the same numbers hold for large models and human raters: the model, its world and the "
    "referee are small, and the referee is a program. Intervals are over prompts: they do not say what another "
    "training of the judges would have changed. Nor does it show what makes the query look where it looks; a map of "
    "attention is what was read, not why.",
    "Schedules, noise levels and the settings of heads and pixel judges were fixed on validation prompts before the "
    "test prompts were looked at. The pixel judges that ship come from a full run, and saw more prompts than a short "
    "demo trains on. All candidates are computed once per prompt, and every strategy then picks from the same scores; "
    "on some prompts each strategy was also run by itself, and costs and times come from these separate runs.",
)


def notes(metrics: Mapping[str, Any]) -> list[str]:
    """Paragraphs on what a demo's numbers show and do not show; what an interval leaves open is said to be open."""
    said = [_of_judge(metrics), _of_pick(metrics), _of_pixels(metrics)]
    return [" ".join(sentence for sentence in said if sentence), *LIMITS]


def summary(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The main numbers of a run on test prompts: what they are, each with its value and interval."""
    rows = [
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


def beside(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A run's main numbers beside those of the full run that the documentation reports (docs/evidence)."""
    here, full = summary(metrics), files.read_json(FULL_RUN)
    known = {row["what"]: row for row in full["rows"]}
    rows = [{**row, "full": known[row["what"]]["value"], "full_ci95": known[row["what"]]["ci95"]}
            for row in here["rows"] if row["what"] in known]  # fmt: skip
    return {**here, "rows": rows, "full_prompts": full["prompts"], "full_judges": full["judges"]}


def _accuracies(metrics: Mapping[str, Any]) -> list[Row]:
    rows = [row for row in wording.pooled(metrics["accuracy"])
            if (row["judge"], row["set"], row["dimension"]) == ("prism", "test", "overall")]  # fmt: skip
    return [row for t in LEVELS for row in rows if row["t"] == t and row["without_ties"] is not None]


def _picks(metrics: Mapping[str, Any]) -> list[Row]:
    return [row for row in wording.pooled(metrics["best_of_n"]) if row["set"] == "test" and wording.is_main(row)]


def _of_judge(metrics: Mapping[str, Any]) -> str:
    rows = _accuracies(metrics)
    better = [row for row in rows if row["without_ties_ci95"] and row["without_ties_ci95"][0] > 0.5]
    worse = [row for row in rows if row["without_ties_ci95"] and row["without_ties_ci95"][1] < 0.5]
    open_ = [row for row in rows if row not in better and row not in worse]
    found = []
    if better:
        found.append(f"The judge orders noisy latents of prompts it never saw better than chance at {_levels(better)}.")
    if worse:
        found.append(f"At {_levels(worse)} it orders them worse than chance.")
    if open_:
        found.append(
            f"At {_levels(open_)} the interval includes 50 %, or there are too few prompts for one: whether the judge "
            "sees anything there, this run does not show."
        )
    return " ".join(found)


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
    if early["referee_gain"] < 0:
        return f"{what} picks worse than chance in this run."
    full, share = rows.get("full"), wording.percent(early["oracle_share"], 0)
    of_full = "" if full is None else f"; full, which finishes all, reaches {wording.percent(full['oracle_share'], 0)}"
    return (
        f"{what} picks better than chance: {share} of what a perfect pick, the oracle’s, would gain, for "
        f"{wording.percent(early['denoiser_share_of_full'], 0)} of full Best-of-{early['n']}’s denoiser rows{of_full}."
    )


def _of_pixels(metrics: Mapping[str, Any]) -> str:
    rows = [row for row in metrics.get("judge_comparison", [])
            if (row["set"], row["dimension"]) == ("test", "overall") and row["t"] in (*LEVELS, 0)]  # fmt: skip
    found = []
    for name in dict.fromkeys(row["against"] for row in rows):
        own = [row for row in rows if row["against"] == name]
        clear = [row for row in own if wording.clear(row["ci95"])]
        verdicts = [
            (f"more accurate at {_levels(some)}" if better else f"less accurate at {_levels(some)}")
            for better in (True, False)
            if (some := [row for row in clear if (row["difference"] > 0) == better])
        ]
        if rest := [row for row in own if row not in clear]:
            verdicts.append(f"not told apart at {_levels(rest)}")
        found.append(f"Against the judge {name}: {', '.join(verdicts)}.")
    return " ".join(found)


def _levels(rows: Sequence[Row]) -> str:
    return "t = " + ", ".join(f"{row['t']:g}" for row in sorted(rows, key=lambda row: -row["t"]))
