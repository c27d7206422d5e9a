"""The tables of `prism eval` beside accuracy by level: another judge, pairs of generators, calibration, bias probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prism.report import wording
from prism.report.rows import BiasRow, ComparisonRow, GeneratorRow, ReliabilityRow, SwapRow
from prism.report.tables import Column, Table

MORE = {
    "length": "longer",
    "rate": "more frames per second",
    "resolution": "larger picture",
    "brightness": "brighter",
    "motion": "more motion",
}


def evaluation_tables(metrics: Mapping[str, Any]) -> dict[str, Table[Any]]:
    """The tables of a metrics document of `prism eval` that have rows, by name."""
    if metrics["command"] != "eval":
        return {}
    every: dict[str, Table[Any]] = {
        "against": against_table(metrics.get("judge_comparison", [])),
        "generators": generators_table(wording.leading(metrics.get("generators", []))),
        "reliability": reliability_table(wording.leading(metrics.get("reliability", []), every_level=True)),
        "biases": biases_table(wording.leading(metrics.get("biases", []))),
    }
    return {name: table for name, table in every.items() if table.rows}


def against_table(rows: Sequence[ComparisonRow]) -> Table[ComparisonRow]:
    """`rows` as in "judge_comparison" of two single judges, one line each; fits 80 columns."""
    judges = f"{rows[0]['judge']} over {rows[0]['against']}" if rows else ""
    return Table(
        [
            Column("t", lambda row: f"{row['t']:g}"),
            Column("", lambda row: row["dimension"], left=True, page="dimension"),
            Column("points", lambda row: wording.points(row["difference"]), style="bold"),
            Column("95 %\ninterval", lambda row: wording.points_interval(row["ci95"]), style="dim"),
            Column("right:\nfirst only", lambda row: wording.whole(row.get("better"))),
            Column("second\nonly", lambda row: wording.whole(row.get("worse")), page="right: second only"),
            Column("exact\np", lambda row: _p(row.get("mcnemar_p")), page="McNemar’s p"),
            Column("pairs", lambda row: str(row["pairs"]), page="decided pairs"),
        ],
        rows,
        f"Accuracy of {judges}",
        "difference in percentage points on the same pairs under the same noise, its interval paired and resampled by "
        "prompt; the exact p is McNemar’s, which takes pairs for independent",
    )


def generators_table(rows: Sequence[GeneratorRow]) -> Table[GeneratorRow]:
    """`rows` as in "generators", of one level and dimension, one line each; fits 80 columns."""

    def name(row: GeneratorRow) -> str:
        return row["model_a"] if row["model_a"] == row["model_b"] else f"{row['model_a']} / {row['model_b']}"

    return Table(
        [
            Column("clips of", name, left=True),
            Column("right", lambda row: wording.percent(row["without_ties"]), style="bold"),
            Column("95 %\ninterval", lambda row: wording.percent_interval(row["without_ties_ci95"], 0), style="dim"),
            Column("judge for\nthe first", lambda row: wording.percent(row["judge_share"], 0)),
            Column("people", lambda row: wording.percent(row["people_share"], 0)),
            Column("difference\n95 %", lambda row: wording.points_interval(row["difference_ci95"]), style="dim"),
            Column("decided\npairs", lambda row: str(row["decided_pairs"])),
        ],
        rows,
        f"Per pair of generators{_where(rows)}",
        "right: of the decided pairs; how often judge and people prefer the first generator’s clip",
    )


def reliability_table(rows: Sequence[ReliabilityRow]) -> Table[ReliabilityRow]:
    """`rows` as in "reliability", of one dimension, one line each; fits 80 columns."""

    def refitted(row: ReliabilityRow, name: str) -> float | None:
        return None if row["refitted"] is None else row["refitted"][name]

    def nats(value: float | None) -> str:
        return wording.MISSING if value is None else f"{value:.2f}"

    return Table(
        [
            Column("t", lambda row: f"{row['t']:g}"),
            Column("NLL", lambda row: nats(row["nll"]), style="bold"),
            Column("of the\nshares", lambda row: nats(row["nll_of_shares"])),
            Column("refitted", lambda row: nats(refitted(row, "nll"))),
            Column("error of\nP(better)", lambda row: wording.percent(row["calibration_error"]), style="bold"),
            Column("by chance", lambda row: wording.percent(row["calibration_error_by_chance"])),
            Column("refitted", lambda row: wording.percent(refitted(row, "calibration_error"))),
            Column("error of\nP(tie)", lambda row: wording.percent(row["tie_calibration_error"])),
            Column("pairs", lambda row: str(row["pairs"])),
        ],
        rows,
        f"Probabilities of better, tie and worse{_where(rows, level=False)}",
        "NLL: mean negative log-likelihood in nats, beside that of one who knows how many are ties and no more; error: "
        "expected calibration error; refitted: temperature and eta that fit the validation pairs",
    )


def biases_table(rows: Sequence[BiasRow]) -> Table[BiasRow]:
    """`rows` as in "biases", of one level and dimension, one line each; fits 80 columns."""
    return Table(
        [
            Column("clip that is", lambda row: MORE.get(row["probe"], row["probe"]), left=True),
            Column("judge for\nit", lambda row: wording.percent(row["judge_share"])),
            Column("people", lambda row: wording.percent(row["people_share"])),
            Column("difference", lambda row: wording.points(row["difference"]), style="bold"),
            Column("95 %\ninterval", lambda row: wording.points_interval(row["difference_ci95"]), style="dim"),
            Column("decided\npairs", lambda row: str(row["pairs"])),
            Column("prompts", lambda row: str(row["prompts"])),
        ],
        rows,
        f"Bias probes{_where(rows)}",
        "of decided pairs whose clips differ by more than 5 %",
    )


def swap_sentence(row: SwapRow) -> str:
    """The outcome of a swap test in words."""
    if row["flipped"] == 0 and row["largest_difference"] == 0:
        return f"Swap test: {row['pairs']} pairs scored as (A, B) and as (B, A) have exactly opposite margins."
    return (
        f"Swap test: of {row['pairs']} pairs scored as (A, B) and as (B, A), {row['flipped']} get another verdict; "
        f"margins differ by at most {row['largest_difference']:.2g}."
    )


def _where(rows: Sequence[Any], level: bool = True) -> str:
    """The dimension, and the level, that all rows are of."""
    if not rows:
        return ""
    return f", {rows[0]['dimension']}" + (f" at t = {rows[0]['t']:g}" if level else "")


def _p(value: float | None) -> str:
    if value is None:
        return wording.MISSING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
