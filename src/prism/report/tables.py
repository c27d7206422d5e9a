"""The two tables of a run on the terminal: accuracy by noise level, and strategies of Best-of-N."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from prism.report import wording

Row = Mapping[str, Any]


def accuracy_table(rows: Sequence[Row], title: str = "Judge: pairwise accuracy by noise level") -> Table:
    """`rows` as in metrics.json's "accuracy": one line per judge and noise level, noisiest first; fits 80 columns."""
    main, others = wording.main_dimension(rows), wording.dimensions(rows)
    caption = (
        "without ties: of the decided pairs, with its 95 % interval over prompts; with ties: of all pairs, the "
        "threshold chosen on validation pairs. t = 1000 is pure noise, 0 is clean"
    )
    if all(row["with_ties_validation_threshold"] is None for row in rows):
        caption = caption.replace("the threshold chosen on validation pairs", "not told, for want of validation pairs")
    table = _table(title, caption)
    judges = {(row["judge"], row["head_seed"], row["source"], row["set"]) for row in rows}
    if len(judges) > 1:
        table.add_column("judge")
        table.add_column("set")
    table.add_column("t", justify="right")
    table.add_column(main, justify="right", style="bold")
    table.add_column("95 %\ninterval", justify="right", style="dim")
    table.add_column("decided\npairs", justify="right", style="dim")
    for dimension in others:
        table.add_column(dimension, justify="right")
    table.add_column(f"{main}\nwith ties", justify="right")
    table.add_column("all\npairs", justify="right", style="dim")
    for group in wording.by_level(rows):
        row = group.get(main) or next(iter(group.values()))
        lead = [wording.judge_name(row), row["set"]] if len(judges) > 1 else []
        cells = [
            f"{row['t']:g}",
            wording.percent(row["without_ties"]),
            wording.percent_interval(row["without_ties_ci95"]),
            wording.whole(row.get("decided_pairs")),
            *(wording.percent(group[name]["without_ties"] if name in group else None) for name in others),
            wording.percent(row["with_ties_validation_threshold"]),
            str(row["pairs"]),
        ]
        table.add_row(*lead, *cells)
    return table


def judges_table(rows: Sequence[Row], title: str = "Judges: pairwise accuracy by noise level") -> Table:
    """The main accuracy of several judges side by side, one line per noise level, noisiest first; fits 80 columns."""
    main, groups = wording.main_dimension(rows), wording.by_level(rows)
    short = wording.short_names(rows)
    names = list(dict.fromkeys(wording.judge_name(next(iter(group.values()))) for group in groups))
    cells: dict[float, dict[str, tuple[str, str]]] = {}
    for group in groups:
        row = group.get(main) or next(iter(group.values()))
        pair = wording.percent(row["without_ties"]), wording.percent_interval(row["without_ties_ci95"], 0)
        cells.setdefault(row["t"], {})[wording.judge_name(row)] = pair
    missing = f"; {wording.MISSING}: not measured" if any(len(some) < len(names) for some in cells.values()) else ""
    of = next((f" of {row['decided_pairs']} decided pairs" for row in rows if row.get("decided_pairs")), "")
    table = _table(title, f"{main}, without ties{of}, 95 % interval over prompts; t = 1000 is noise, 0 clean{missing}")
    table.add_column("t", justify="right")
    for name in names:
        table.add_column(short[name], justify="right", style="bold")
        table.add_column("95 %\ninterval", justify="right", style="dim")
    for t in sorted(cells, reverse=True):
        line = [cells[t].get(name, (wording.MISSING, wording.MISSING)) for name in names]
        table.add_row(f"{t:g}", *(cell for pair in line for cell in pair))
    return table


def best_of_n_table(rows: Sequence[Row], title: str | None = None) -> Table:
    """`rows` as in metrics.json's "best_of_n": one line per strategy, as given; fits 80 columns.

    The columns of what a pick gains are left out where no referee measured it.
    """
    sizes = "/".join(str(n) for n in sorted({row["n"] for row in rows}))
    measured = any(row["referee_gain"] is not None for row in rows)
    main = [row for row in rows if wording.is_main(row) and row["strategy"] != "none"]
    settings = list(dict.fromkeys(f"{wording.strategy_name(row)}: {wording.how(row)}" for row in main))
    prompts = "/".join(str(n) for n in sorted({row["prompts"] for row in rows}))
    unit = f"{prompts} prompts; gain: over a random pick on average, in within-prompt standard deviations"
    name = f"Best-of-{sizes}: {'what each strategy picks and what it costs' if measured else 'what it cost'}"
    table = _table(title or name, "\n".join([*([unit] if measured else []), "; ".join(settings)]))
    table.add_column("strategy", style="bold", no_wrap=True)
    if measured:
        table.add_column("gain", justify="right", no_wrap=True)
        table.add_column("95 %\ninterval", justify="right", style="dim", no_wrap=True)
        table.add_column("share of\noracle", justify="right", no_wrap=True)
    table.add_column("denoiser\nrows", justify="right", no_wrap=True)
    table.add_column("share of\nfull", justify="right", no_wrap=True)
    table.add_column("VAE\ndecodes", justify="right", no_wrap=True)
    if not measured:
        table.add_column("seconds", justify="right", style="dim", no_wrap=True)
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
            *([] if measured else [f"{row['seconds']:.1f}"]),
        )
    return table


def beside_table(beside: Mapping[str, Any]) -> Table:
    """A run's main numbers beside the full run's; fits 80 columns."""
    many = f"{beside['full_prompts']} prompts, {beside['full_judges']} judges"
    few = f"{beside['prompts']} prompt{'' if beside['prompts'] == 1 else 's'}"
    caption = f"full run: docs/evidence, {many}; this one: {few}. 95 % intervals over prompts"
    table = _table("This run beside the full run", caption)
    for name in ("", "this run", "95 %\ninterval", "full run", "95 %\ninterval"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in beside["rows"]:
        here = wording.percent(row["value"]), wording.percent_interval(row["ci95"], 0)
        table.add_row(row["what"], *here, wording.percent(row["full"]), wording.percent_interval(row["full_ci95"], 0))
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
