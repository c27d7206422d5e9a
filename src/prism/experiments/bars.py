"""The bars that a full run is held to, each beside what was reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prism.report import wording

Row = Mapping[str, Any]
LEVELS = (899, 699, 499)
ROWS = 0.35  # most denoiser rows, as a share of full Best-of-N's
EARLY, DRAFT = (0.50, 0.40), (0.65, 0.55)  # least share of the oracle's gain, and of its interval's lower end
FIRST = 0.2  # share of the steps by which an early cut must come
OVERHEAD = 0.03


def check(
    comparison: Sequence[Row], picks: Sequence[Row], early: str, draft: str, overhead: float | None
) -> list[dict[str, Any]]:
    """Rows "bar", "reached", "met" (None where it was not measured, or on too few prompts for an interval).

    comparison: "judge_comparison" rows. picks: "best_of_n" rows of the test prompts; `early` and `draft` name those
    that were fixed beforehand. overhead: the sampler's share of a run.
    """
    found = []
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
        text = (
            "" if row is None else f"{wording.points(row['difference'])} points ({wording.points_interval(interval)})"
        )
        found.append(
            _bar(
                f"more accurate than the pixel judge trained on clean videos at t = {t}: interval above zero",
                text,
                None if interval is None else interval[0] > 0,
            )
        )
    asked = ((early, "one cut in the first fifth of the steps", EARLY), (draft, "drafts", DRAFT))
    for name, what, (least, low) in asked:
        row = next((row for row in wording.pooled(picks) if row["name"] == name and row["set"] == "test"), None)
        bar = (
            f"{what}: at least {least:.0%} of the oracle’s gain, its interval’s lower end {low:.0%}, for at most "
            f"{ROWS:.0%} of the denoiser rows"
        )
        if row is None:
            found.append(_bar(bar, "", None))
            continue
        share, interval, cost = row["oracle_share"], row["oracle_share_ci95"], row["denoiser_share_of_full"]
        text = f"{wording.percent(share)} ({wording.percent_interval(interval)}) for {wording.percent(cost)}"
        met = None if interval is None else share >= least and interval[0] >= low and cost <= ROWS
        cuts = row["schedule"]
        if met and row["strategy"] == "early":
            met = len(cuts) == 1 and cuts[0][0] <= FIRST * row["num_inference_steps"]
        found.append(_bar(bar, f"{text} ({wording.how(row)})", met))
    bar = f"the sampler’s overhead (neither denoiser, head nor VAE) under {OVERHEAD:.0%} of a run"
    found.append(_bar(bar, "" if overhead is None else wording.percent(overhead), _under(overhead)))
    return found


def overhead(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> float | None:
    """The largest share over plans of the time that is neither denoiser, head nor VAE, in their runs by themselves."""
    largest = None
    for name in names:
        runs = [run["ledger"] for record in records for run in record.get("alone", {}).get(name, [])]
        seconds = sum(run["seconds"] for run in runs)
        if seconds:
            rest = seconds - sum(run["parts"][part] for run in runs for part in ("denoiser", "head", "vae"))
            largest = max(largest or 0.0, rest / seconds)
    return largest


def _under(share: float | None) -> bool | None:
    return None if share is None else share < OVERHEAD


def _bar(bar: str, reached: str, met: bool | None) -> dict[str, Any]:
    return {"bar": bar, "reached": reached or wording.MISSING, "met": met}
