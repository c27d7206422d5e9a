"""Groups of metrics.json's rows and texts of their numbers, the same on the terminal and on the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

if TYPE_CHECKING:
    from prism.report.rows import (
        AccuracyRow,
        BestOfNRow,
        BiasRow,
        ComparisonRow,
        GeneratorRow,
        ReliabilityRow,
        StudyRow,
    )

MISSING = "–"
LEVEL = 699  # the headline numbers' noise level, fixed before any run
_SPACE = "\u00a0"  # keeps a number and what belongs to it on one line
Row = Mapping[str, Any]
LevelRow = TypeVar("LevelRow", "GeneratorRow", "ReliabilityRow", "BiasRow")  # of one level and dimension
JudgedRow = TypeVar("JudgedRow", "AccuracyRow", "BestOfNRow")  # all of one kind
# Roles of strategies in a report. "plain": one plain call; "luck": a random pick; "ours": saves work; "reference": its
# cost is the unit of cost; "best": its gain is the unit of gain.
Role = Literal["plain", "luck", "ours", "reference", "best", ""]


class Strategy(Protocol):
    """The interface of a strategy for reports; `prism.sampling.Plan` has it."""

    role: Role

    @staticmethod
    def how(row: Row) -> str: ...

    @staticmethod
    def cut_name(step: int) -> str: ...


_strategies: Callable[[], Mapping[str, Any]] = dict


def tell(strategies: Callable[[], Mapping[str, Any]]) -> None:
    """Set the function that gives the strategies by name, in the order in which reports list them.

    It is called only when a report is made: the package sets that of `prism.sampling`, which is not imported here.
    """
    global _strategies
    _strategies = strategies


def role(row: BestOfNRow) -> Role:
    """The role of a Best-of-N row's strategy in a report."""
    kind: type[Strategy] | None = _strategies().get(row["strategy"])
    return "" if kind is None else kind.role


def is_ours(row: BestOfNRow) -> bool:
    """True for a Best-of-N row of a strategy that saves work."""
    return role(row) == "ours"


def is_blind(row: BestOfNRow) -> bool:
    """True if the pick was made without looking at the candidates, so that its gain is chance around zero."""
    return role(row) in ("plain", "luck")


def ours() -> list[str]:
    """The strategies that save work; the first is that of the headline numbers."""
    return [name for name, kind in _strategies().items() if kind.role == "ours"]


def setting(row: BestOfNRow) -> int | None:
    """The setting that differs between rows of one strategy: the length of a draft, or the step of a single cut."""
    if row["draft_steps"] is not None:
        return int(row["draft_steps"])
    cuts = row["schedule"] or []
    return int(cuts[0][0]) if len(cuts) == 1 else None


def main_dimension(rows: Sequence[AccuracyRow]) -> str:
    """The dimension that leads a table of accuracy rows: overall, or the first of a judge that has no overall."""
    names = [row["dimension"] for row in rows]
    return "overall" if "overall" in names or not names else names[0]


def dimensions(rows: Sequence[AccuracyRow]) -> list[str]:
    """The dimensions of accuracy rows besides the main one, in order of appearance."""
    main = main_dimension(rows)
    return [name for name in dict.fromkeys(row["dimension"] for row in rows) if name != main]


def leading(rows: Sequence[LevelRow], every_level: bool = False) -> list[LevelRow]:
    """The rows of the main dimension at the level nearest to `LEVEL`, or at every level, noisiest first."""
    names = [row["dimension"] for row in rows]
    main = "overall" if "overall" in names or not names else names[0]
    kept = [row for row in rows if row["dimension"] == main]
    if every_level:
        return sorted(kept, key=lambda row: -row["t"])
    nearest = min((row["t"] for row in kept), key=lambda t: abs(t - LEVEL), default=None)
    return [row for row in kept if row["t"] == nearest]


def pooled(rows: Sequence[JudgedRow]) -> list[JudgedRow]:
    """The rows to show: if judges of several seeds were measured, their common rows in place of one per seed."""
    together = {(row["judge"], row["set"]) for row in rows if row.get("head_seeds")}
    return [row for row in rows if row.get("head_seeds") or (row["judge"], row["set"]) not in together]


def apart(rows: Sequence[JudgedRow]) -> list[JudgedRow]:
    """The rows per seed, if judges of several seeds were measured; none for a judge of one seed."""
    together = {(row["judge"], row["set"]) for row in rows if row.get("head_seeds")}
    return [row for row in rows if not row.get("head_seeds") and (row["judge"], row["set"]) in together]


def is_main(row: BestOfNRow) -> bool:
    """True for a Best-of-N row of a strategy with the settings that were fixed before the run."""
    return bool(row.get("name", row["strategy"]) == row["strategy"])


def in_order(rows: Sequence[BestOfNRow]) -> list[BestOfNRow]:
    """Best-of-N rows by strategy and then by cost."""
    order = list(_strategies())

    def key(row: BestOfNRow) -> tuple[Any, ...]:
        position = order.index(row["strategy"]) if row["strategy"] in order else len(order)
        return position, row["n"], len(row["schedule"] or []), row["denoiser_share_of_full"] or 0.0

    return sorted(rows, key=key)


def by_set(rows: Sequence[JudgedRow]) -> dict[str, list[JudgedRow]]:
    """Rows by the prompts they were measured on, in order of appearance."""
    groups: dict[str, list[JudgedRow]] = {}
    for row in rows:
        groups.setdefault(row["set"], []).append(row)
    return groups


def by_question(rows: Sequence[StudyRow]) -> dict[str, list[StudyRow]]:
    """A study's rows by the question they answer, in order of appearance."""
    groups: dict[str, list[StudyRow]] = {}
    for row in rows:
        groups.setdefault(row["question"], []).append(row)
    return groups


def comparison(rows: Sequence[ComparisonRow]) -> list[dict[str, Any]]:
    """ "judge_comparison" rows as one {set, t, against: {judge: {dimension: row}}}, noisiest level first."""
    entries: dict[tuple[str, float], dict[str, Any]] = {}
    for row in rows:
        entry = entries.setdefault((row["set"], -row["t"]), {"set": row["set"], "t": row["t"], "against": {}})
        entry["against"].setdefault(row["against"], {})[row["dimension"]] = row
    order = {name: i for i, name in enumerate(dict.fromkeys(row["set"] for row in rows))}
    return [entries[key] for key in sorted(entries, key=lambda key: (order[key[0]], key[1]))]


def points(value: float) -> str:
    """A difference of shares in percentage points."""
    return _number(100 * value, 1, "+")


def clear(interval: Sequence[float] | None) -> bool:
    """True for an interval of a difference that does not contain zero."""
    return interval is not None and (interval[0] > 0 or interval[1] < 0)


def points_interval(value: Sequence[float] | None) -> str:
    return MISSING if value is None else f"{points(value[0])}{_SPACE}…{_SPACE}{points(value[1])}"


def judge_name(row: AccuracyRow | BestOfNRow) -> str:
    """The judge's name with its head's seed and training source, if it has them."""
    seed = "" if row.get("head_seed") is None else f", seed {row['head_seed']}"
    if row.get("head_seeds"):
        seed = f", {len(row['head_seeds'])} seeds"
    source = row.get("source")
    source = "" if source in (None, "renoised", "decoded") else f" ({source})"
    return f"{row['judge']}{seed}{source}"


def short_names(rows: Sequence[AccuracyRow]) -> dict[str, str]:
    """Names of judges without seeds, if they are distinct without: name -> short name."""
    names = {judge_name(row): row["judge"] for row in rows}
    return {name: short if list(names.values()).count(short) == 1 else name for name, short in names.items()}


def by_level(rows: Sequence[AccuracyRow]) -> list[dict[str, AccuracyRow]]:
    """Accuracy rows as one {dimension: row} per judge, set and noise level; judges as they come, noisiest first."""
    groups: dict[tuple[Any, ...], dict[str, AccuracyRow]] = {}
    for row in rows:
        key = (row["judge"], row["head_seed"], row["source"], row["set"], row["t"])
        groups.setdefault(key, {})[row["dimension"]] = row
    order = {key[:4]: i for i, key in reversed(list(enumerate(groups)))}
    return [groups[key] for key in sorted(groups, key=lambda key: (order[key[:4]], -key[4]))]


def strategy_name(row: BestOfNRow) -> str:
    """The strategy's name, with the judge's if that was not our head."""
    return row["strategy"] if row["judge"] in ("prism", "referee", None) else f"{row['strategy']} ({row['judge']})"


def judged_at(row: Row) -> str:
    """The noise level at which a Best-of-N row's finished latents were judged; "" if they were not re-noised."""
    return "" if row["judge_at"] is None else f"judged at t{_SPACE}={_SPACE}{row['judge_at']:g}"


def how(row: BestOfNRow) -> str:
    """One Best-of-N row's settings in words: its cuts, or its draft and the noise level it is judged at."""
    kind: type[Strategy] | None = _strategies().get(row["strategy"])
    return MISSING if kind is None else kind.how(row)


def cut_name(strategy: str, step: int) -> str:
    """A cut in words."""
    kind: type[Strategy] | None = _strategies().get(strategy)
    return f"step {step}" if kind is None else kind.cut_name(step)


def percent(value: float | None, digits: int = 1) -> str:
    return MISSING if value is None else f"{_number(100 * value, digits)}{_SPACE}%"


def percent_interval(value: Sequence[float] | None, digits: int = 1) -> str:
    if value is None:
        return MISSING
    return f"{100 * value[0]:.{digits}f}{_SPACE}…{_SPACE}{100 * value[1]:.{digits}f}".replace("-", "−")


def signed(value: float | None) -> str:
    return MISSING if value is None else _number(value, 2, "+")


def _number(value: float, digits: int, sign: str = "") -> str:
    """A number with a typographic minus sign, and no sign if it rounds to zero."""
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}".replace("-", "−")


def signed_interval(value: Sequence[float] | None) -> str:
    return MISSING if value is None else f"{signed(value[0])}{_SPACE}…{_SPACE}{signed(value[1])}"


def whole(value: int | None) -> str:
    return MISSING if value is None else str(value)


def count(value: float) -> str:
    """A number with thousands separated by a narrow space; one decimal only if there is a fraction."""
    text = f"{value:,.0f}" if float(value).is_integer() or value >= 1000 else f"{value:,.1f}"
    return text.replace(",", "\u202f")
