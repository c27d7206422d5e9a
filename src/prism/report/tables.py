"""The two tables of a run on the terminal: accuracy by noise level, and strategies of Best-of-N."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from prism.report import wording


def accuracy_table(rows: Sequence[Mapping[str, Any]], title: str = "Judge: pairwise accuracy by noise level") -> Table:
    """`rows` as in metrics.json's "accuracy": one line a judge and noise level, noisiest first."""
    dimensions = wording.dimensions(rows)
    table = _table(title, "without ties, 95 % interval over prompts; t = 1000 is pure noise, 0 is clean")
    judges = {(row["judge"], row["head_seed"], row["source"], row["set"]) for row in rows}
    if len(judges) > 1:
        table.add_column("judge")
        table.add_column("set")
    table.add_column("t", justify="right")
    table.add_column("overall", justify="right", style="bold")
    table.add_column("95 %\ninterval", justify="right", style="dim")
    for dimension in dimensions:
        table.add_column(dimension, justify="right")
    table.add_column("with ties", justify="right")
    table.add_column("pairs", justify="right", style="dim")
    for group in wording.by_level(rows):
        main = group.get("overall") or next(iter(group.values()))
        lead = [wording.judge_name(main), main["set"]] if len(judges) > 1 else []
        cells = [
            f"{main['t']:g}",
            wording.percent(main["without_ties"]),
            wording.percent_interval(main["without_ties_ci95"]),
            *(wording.percent(group[name]["without_ties"] if name in group else None) for name in dimensions),
            wording.percent(main["with_ties_validation_threshold"]),
            str(main["pairs"]),
        ]
        table.add_row(*lead, *cells)
    return table


def judges_table(rows: Sequence[Mapping[str, Any]], title: str = "Judges: pairwise accuracy by noise level") -> Table:
    """The overall accuracy of several judges side by side, one line a noise level, noisiest first; fits 80 columns."""
    table = _table(title, "overall, without ties, 95 % interval over prompts; t = 1000 is pure noise, 0 is clean")
    groups = wording.by_level(rows)
    names = list(dict.fromkeys(wording.judge_name(next(iter(group.values()))) for group in groups))
    table.add_column("t", justify="right")
    for name in names:
        table.add_column(name, justify="right", style="bold")
        table.add_column("95 %\ninterval", justify="right", style="dim")
    cells: dict[float, dict[str, tuple[str, str]]] = {}
    for group in groups:
        row = group.get("overall") or next(iter(group.values()))
        pair = wording.percent(row["without_ties"]), wording.percent_interval(row["without_ties_ci95"], 0)
        cells.setdefault(row["t"], {})[wording.judge_name(row)] = pair
    for t in sorted(cells, reverse=True):
        found = [cells[t].get(name, (wording.MISSING, wording.MISSING)) for name in names]
        table.add_row(f"{t:g}", *(cell for pair in found for cell in pair))
    return table


def best_of_n_table(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> Table:
    """`rows` as in metrics.json's "best_of_n": one line a strategy, as given; fits 80 columns.

    The columns of what a pick gains are left out where no referee measured it.
    """
    sizes = "/".join(str(n) for n in sorted({row["n"] for row in rows}))
    measured = any(row["referee_gain"] is not None for row in rows)
    main = [row for row in rows if wording.is_main(row) and row["strategy"] != "none"]
    settings = list(dict.fromkeys(f"{wording.strategy_name(row)}: {wording.how(row)}" for row in main))
    prompts = "/".join(str(n) for n in sorted({row["prompts"] for row in rows}))
    unit = [f"{prompts} prompts; gain over a random pick in within-prompt standard deviations"] if measured else []
    name = f"Best-of-{sizes}: {'what each strategy picks and what it costs' if measured else 'what it cost'}"
    table = _table(title or name, "\n".join([*unit, "; ".join(settings)]))
    table.add_column("strategy", style="bold")
    if measured:
        table.add_column("gain", justify="right")
        table.add_column("95 %\ninterval", justify="right", style="dim")
        table.add_column("share of\noracle", justify="right")
    table.add_column("denoiser\nrows", justify="right")
    table.add_column("share of\nfull", justify="right")
    table.add_column("VAE\ndecodes", justify="right")
    table.add_column("seconds", justify="right", style="dim")
    for row in rows:
        gain = [
            wording.signed(row["referee_gain"]),
            wording.signed_interval(row["referee_gain_ci95"]),
            wording.percent(row["oracle_share"], 0),
        ]
        table.add_row(
            wording.strategy_name(row) if wording.is_main(row) else row["name"],
            *(gain if measured else []),
            wording.count(row["denoiser_rows"]),
            wording.percent(row["denoiser_share_of_full"]),
            wording.count(row["vae_decodes"]),
            f"{row['seconds']:.1f}",
        )
    return table


def _table(title: str, caption: str) -> Table:
    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        header_style="dim",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
