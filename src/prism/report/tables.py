"""The tables of a run: each column is written once, for the terminal (rich) and for a page (Markdown)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from prism.report import wording
from prism.report.rows import (
    AccuracyRow,
    AttentionRow,
    Beside,
    BesideRow,
    BestOfNRow,
    CalibrationRow,
    ClaimRow,
    ComparisonRow,
    SightRow,
    StudyRow,
)

Count = Literal["pairs", "prompts", "decided_pairs", "decided_prompts"]
Row = TypeVar("Row")
Group = Mapping[str, AccuracyRow]  # accuracy rows of one judge at one level, by dimension


@dataclass(frozen=True)
class Column(Generic[Row]):
    """A column's head and the function that gives its cell for a row. `page`: another head for a page.

    A line break in `head` is kept on the terminal and becomes a space on a page.
    """

    head: str
    cell: Callable[[Row], str]
    page: str = ""
    style: str = ""
    left: bool = False


@dataclass(frozen=True)
class Table(Generic[Row]):
    """Columns and rows. rich prints the table; `markdown` gives it for a page, without title and caption."""

    columns: Sequence[Column[Row]]
    rows: Sequence[Row]
    title: str = ""
    caption: str = ""
    no_wrap: bool = False

    def __rich__(self) -> Any:
        from rich import box
        from rich.table import Table as RichTable

        table = RichTable(
            title=self.title,
            caption=self.caption,
            title_justify="left",
            caption_justify="left",
            title_style="bold",
            header_style="dim",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        for column in self.columns:
            justify = "left" if column.left else "right"
            table.add_column(column.head, justify=justify, style=column.style, no_wrap=self.no_wrap)  # type: ignore[arg-type]
        for row in self.rows:
            table.add_row(*(column.cell(row) for column in self.columns))
        return table

    def markdown(self) -> str:
        heads = [column.page or column.head.replace("\n", " ") for column in self.columns]
        return markdown(heads, [[column.cell(row) for column in self.columns] for row in self.rows])


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *lines))


def _interval(cell: Callable[[Row], str]) -> Column[Row]:
    return Column("95 %\ninterval", cell, style="dim")


def accuracy_table(
    rows: Sequence[AccuracyRow], title: str = "Judge: pairwise accuracy by noise level", whole: bool = False
) -> Table[Group]:
    """`rows` as in metrics.json's "accuracy": one line per judge and noise level, noisiest first.

    Fits 80 columns unless `whole`, which is for a page and names the judge and every count.
    """
    main, others = wording.main_dimension(rows), wording.dimensions(rows)

    def leading(group: Group) -> AccuracyRow:
        return group.get(main) or next(iter(group.values()))

    def of(head: str, cell: Callable[[AccuracyRow], str], **changes: Any) -> Column[Group]:
        return Column(head, lambda group: cell(leading(group)), **changes)

    def count(head: str, key: Count) -> Column[Group]:
        return of(head, lambda row: wording.whole(row.get(key)), style="dim")

    def dimension(name: str) -> Column[Group]:
        return Column(name, lambda group: wording.percent(group[name]["without_ties"] if name in group else None))

    names = [of("judge", wording.judge_name, left=True), of("set", lambda row: row["set"], left=True)]
    accuracy = [
        of("t", lambda row: f"{row['t']:g}"),
        of(main, lambda row: wording.percent(row["without_ties"]), style="bold"),
        of("95 %\ninterval", lambda row: wording.percent_interval(row["without_ties_ci95"]), style="dim"),
    ]
    by_dimension = [dimension(name) for name in others]
    ties = of(
        f"{main}\nwith ties",
        lambda row: wording.percent(row["with_ties_validation_threshold"]),
        page="with ties, threshold of validation pairs",
    )
    decided, pairs = count("decided\npairs", "decided_pairs"), count("all\npairs", "pairs")
    groups = wording.by_level(rows)
    if whole:
        prompts = count("prompts", "decided_prompts"), count("prompts", "prompts")
        return Table([*names, *accuracy, *by_dimension, ties, decided, prompts[0], pairs, prompts[1]], groups)
    caption = (
        "without ties: of the decided pairs, with its 95 % interval over prompts; with ties: of all pairs, the "
        "threshold chosen on validation pairs. t = 1000 is pure noise, 0 is clean"
    )
    if all(row["with_ties_validation_threshold"] is None for row in rows):
        caption = caption.replace("the threshold chosen on validation pairs", "not known without validation pairs")
    judges = {(row["judge"], row["head_seed"], row["source"], row["set"]) for row in rows}
    columns = [*(names if len(judges) > 1 else []), *accuracy, decided, *by_dimension, ties, pairs]
    return Table(columns, groups, title, caption)


def judges_table(
    rows: Sequence[AccuracyRow], title: str = "Judges: pairwise accuracy by noise level"
) -> Table[tuple[float, dict[str, AccuracyRow]]]:
    """The main accuracy of several judges side by side, one line per noise level, noisiest first; fits 80 columns."""
    main, groups = wording.main_dimension(rows), wording.by_level(rows)
    short = wording.short_names(rows)
    names = list(dict.fromkeys(wording.judge_name(next(iter(group.values()))) for group in groups))
    by_t: dict[float, dict[str, AccuracyRow]] = {}
    for group in groups:
        row = group.get(main) or next(iter(group.values()))
        by_t.setdefault(row["t"], {})[wording.judge_name(row)] = row
    missing = f"; {wording.MISSING}: not measured" if any(len(some) < len(names) for some in by_t.values()) else ""
    counts = (row.get("decided_pairs") for row in rows if row["dimension"] == main)
    of = next((f" of {count} decided pairs" for count in counts if count), "")

    def judge(name: str) -> list[Column[tuple[float, dict[str, AccuracyRow]]]]:
        def value(line: tuple[float, dict[str, AccuracyRow]], key: str) -> Any:
            return line[1][name].get(key) if name in line[1] else None

        return [
            Column(short[name], lambda line: wording.percent(value(line, "without_ties")), style="bold"),
            Column(
                "95 %\ninterval",
                lambda line: wording.percent_interval(value(line, "without_ties_ci95"), 0),
                style="dim",
            ),
        ]

    return Table(
        [Column("t", lambda line: f"{line[0]:g}"), *(column for name in names for column in judge(name))],
        sorted(by_t.items(), key=lambda line: -line[0]),
        title,
        f"{main}, without ties{of}, 95 % interval over prompts; t = 1000 is noise, 0 clean{missing}",
    )


def best_of_n_table(rows: Sequence[BestOfNRow], title: str | None = None, whole: bool = False) -> Table[BestOfNRow]:
    """`rows` as in metrics.json's "best_of_n": one line per strategy, as given.

    Fits 80 columns unless `whole`, which is for a page and names settings and judge in every row. On the terminal the
    columns of a pick's gain are left out if no referee measured it.
    """

    gain: list[Column[BestOfNRow]] = [
        Column("gain", lambda row: wording.signed(row["referee_gain"])),
        _interval(lambda row: wording.signed_interval(row["referee_gain_ci95"])),
    ]
    cost: list[Column[BestOfNRow]] = [
        Column("denoiser\nrows", lambda row: wording.count(row["denoiser_rows"])),
        Column("share of\nfull", lambda row: wording.percent(row["denoiser_share_of_full"]), page="of full"),
        Column("VAE\ndecodes", lambda row: str(row["vae_decodes"]) if whole else wording.count(row["vae_decodes"])),
    ]
    if whole:
        return Table(
            [
                Column("strategy", lambda row: row["strategy"]),
                Column("how", wording.how),
                Column("judge", lambda row: wording.judge_name(row) if row["judge"] else wording.MISSING),
                *gain,
                Column("share of the oracle's gain", lambda row: wording.percent(row["oracle_share"])),
                _interval(lambda row: wording.percent_interval(row["oracle_share_ci95"])),
                *cost,
                Column("head calls", lambda row: str(row["head_calls"])),
                Column("seconds", lambda row: f"{row['seconds']:.0f}"),
            ],
            rows,
        )
    sizes = "/".join(str(n) for n in sorted({row["n"] for row in rows}))
    measured = any(row["referee_gain"] is not None for row in rows)
    main = [row for row in rows if wording.is_main(row) and wording.role(row) != "plain"]
    settings = list(dict.fromkeys(f"{wording.strategy_name(row)}: {wording.how(row)}" for row in main))
    prompts = "/".join(str(n) for n in sorted({row["prompts"] for row in rows}))
    unit = f"{prompts} prompts; gain: over a random pick on average, in within-prompt standard deviations"
    name = f"Best-of-{sizes}: {'what each strategy picks and what it costs' if measured else 'what it cost'}"
    strategy: Column[BestOfNRow] = Column(
        "strategy",
        lambda row: wording.strategy_name(row) if wording.is_main(row) else row["name"],
        style="bold",
        left=True,
    )
    share: Column[BestOfNRow] = Column("share of\noracle", lambda row: wording.percent(row["oracle_share"], 0))
    seconds: Column[BestOfNRow] = Column("seconds", lambda row: f"{row['seconds']:.1f}", style="dim")
    columns = [strategy, *gain, share, *cost] if measured else [strategy, *cost, seconds]
    caption = "\n".join([*([unit] if measured else []), "; ".join(settings)])
    return Table(columns, rows, title or name, caption, no_wrap=True)


def comparison_table(rows: Sequence[ComparisonRow]) -> Table[ComparisonRow]:
    """`rows` as in metrics.json's "judge_comparison", one line each."""
    return Table(
        [
            Column("set", lambda row: row["set"]),
            Column("against", lambda row: row["against"]),
            Column("t", lambda row: f"{row['t']:g}"),
            Column("dimension", lambda row: row["dimension"]),
            Column("difference", lambda row: wording.points(row["difference"])),
            _interval(lambda row: wording.points_interval(row["ci95"])),
            Column("decided pairs", lambda row: str(row["pairs"])),
            Column("prompts", lambda row: str(row["prompts"])),
        ],
        rows,
    )


def attention_table(rows: Sequence[AttentionRow]) -> Table[AttentionRow]:
    """`rows` as in metrics.json's "attention", one line each."""
    return Table(
        [
            Column("t", lambda row: f"{row['t']:g}"),
            Column("candidates", lambda row: row["candidates"]),
            Column("mean score", lambda row: f"{row['referee']:.2f}"),
            Column("attention on objects", lambda row: wording.percent(row["attention_share"])),
            Column("cells that are objects", lambda row: wording.percent(row["area_share"])),
            Column("ratio", lambda row: wording.MISSING if row["lift"] is None else f"{row['lift']:.2f}"),
            _interval(lambda row: " … ".join(f"{end:.2f}" for end in row["lift_ci95"] or ()) or wording.MISSING),
        ],
        rows,
    )


def claims_table(rows: Sequence[ClaimRow]) -> Table[ClaimRow]:
    """`rows` as in metrics.json's "bars", one line each."""
    verdicts = {None: wording.MISSING, True: "yes", False: "no"}
    return Table(
        [
            Column("bar", lambda row: row["bar"]),
            Column("reached", lambda row: row["reached"]),
            Column("met", lambda row: verdicts[row["met"]]),
        ],
        rows,
    )


def beside_table(beside: Beside) -> Table[BesideRow]:
    """A run's main numbers next to those of the full run; fits 80 columns."""
    many = f"{beside['full_prompts']} prompts, {beside['full_judges']} judges"
    few = f"{beside['prompts']} prompt{'' if beside['prompts'] == 1 else 's'}"
    columns: list[Column[BesideRow]] = [
        Column("", lambda row: row["what"], left=True),
        Column("this run", lambda row: wording.percent(row["value"])),
        Column("95 %\ninterval", lambda row: wording.percent_interval(row["ci95"], 0)),
        Column("full run", lambda row: wording.percent(row["full"])),
        Column("95 %\ninterval", lambda row: wording.percent_interval(row["full_ci95"], 0)),
    ]
    caption = f"full run: docs/evidence, {many}; this one: {few}. 95 % intervals over prompts"
    return Table(columns, beside["rows"], "This run beside the full run", caption, no_wrap=True)


def sight_table(rows: Sequence[SightRow]) -> Table[SightRow]:
    """`rows` as in metrics.json's "sight", one line each; fits 80 columns."""

    def before(row: SightRow) -> str:
        interval = wording.percent_interval(row["shipped_ci95"], 0)
        return wording.MISSING if row["shipped"] is None else f"{wording.percent(row['shipped'], 0)} ({interval})"

    now, many = rows[0]["prompts"], max(row["shipped_prompts"] for row in rows)
    columns: list[Column[SightRow]] = [
        Column("step", lambda row: str(row["step"])),
        Column("look", lambda row: "now" if row["look"] == "now" else row["look"], left=True),
        Column("t", lambda row: f"{row['t']:.0f}"),
        Column(f"this run,\n{now} prompts", lambda row: wording.percent(row["share"], 0), style="bold"),
        Column("95 %\ninterval", lambda row: wording.percent_interval(row["share_ci95"], 0), style="dim"),
    ]
    if many:
        columns.append(Column(f"came with the package,\n{many} prompts", before, style="dim"))
    caption = "share of pairs of a prompt's candidates that the judge orders as the referee orders the finished videos"
    return Table(columns, rows, "What the judge sees while a video is sampled", caption)


def study_table(rows: Sequence[StudyRow]) -> Table[StudyRow]:
    """`rows` as in a study's metrics.json, one line per variant; shares in percent."""

    def share(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f}"

    def interval(ends: Sequence[float] | None) -> str:
        return "" if ends is None else f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}"

    def level(t: str) -> Column[StudyRow]:
        return Column(t, lambda row: share(row["by_level"].get(t)))

    def dimension(name: str) -> Column[StudyRow]:
        return Column(name, lambda row: share(row["by_dimension"].get(name)))

    return Table(
        [
            Column("variant", lambda row: f"`{row['variant']}`"),
            Column("", lambda row: row["what"]),
            Column("accuracy", lambda row: share(row["accuracy"])),
            Column("95 %", lambda row: interval(row["accuracy_ci95"])),
            Column("difference", lambda row: f"{100 * row['difference']:+.1f}"),
            Column("95 %", lambda row: interval(row["difference_ci95"])),
            Column("spread", lambda row: share(row["spread"])),
            *(level(t) for t in rows[0]["by_level"]),
            *(dimension(name) for name in ("VQ", "MQ", "TA")),
        ],
        rows,
    )


def calibration_table(rows: Sequence[CalibrationRow]) -> Table[CalibrationRow]:
    """`rows` as in the "calibration" of a study's metrics.json, one line per variant and dimension."""

    def temperature(value: float) -> str:
        return f"{value:.2f}" if value < 100 else "above 100"  # scores without any information on the labels

    return Table(
        [
            Column("judge", lambda row: f"`{row['variant']}`"),
            Column("dimension", lambda row: row["dimension"]),
            Column("temperature", lambda row: temperature(row["temperature"])),
            Column("eta", lambda row: f"{row['eta']:.2f}"),
            Column("NLL before", lambda row: f"{row['nll_before']:.2f}"),
            Column("after", lambda row: f"{row['nll_after']:.2f}"),
            Column("error before", lambda row: f"{100 * row['calibration_error_before']:.1f}"),
            Column("after", lambda row: f"{100 * row['calibration_error_after']:.1f}"),
        ],
        rows,
    )
