"""The claims of a run: limits that it must reach, sentences that follow from its numbers, and the values per prompt
that its intervals are recomputed from.

The values are Parquet files in the run's folder `per_prompt`:

accuracy, a row per set, judge, head_seed, t, dimension and prompt: the numbers of pairs, of decided ones (no tie) and
    of right ones among these. Prompts are in the order of the store, which `recomputed` relies on.
candidates, a row per set, prompt and candidate: its seed, the referee's scores, and "final SEED", the overall score of
    its finished latents by the judge of that head seed.
picks, a row per set, prompt, strategy and head_seed (null where nothing judged): the picked candidate and its seed,
    and the costs of its separate run where there was one.
attention, a row per set, prompt, t and candidates (best or worst by the referee): shares as of `attention.shares`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prism import files
from prism.errors import PrismError
from prism.evaluation import Measurement, prompt_interval
from prism.lab import contest
from prism.lab.attention import CHOSEN, ratio
from prism.report import rows as row_types
from prism.report import wording
from prism.sampling.strategies import kind_of
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
    "test prompts were looked at. The pixel judges that ship come from a full run, and saw more prompts than a short "
    "demo trains on. All candidates are computed once per prompt, and every strategy then picks from the same scores; "
    "on some prompts each strategy was also run by itself, and costs and times come from these separate runs.",
)


def notes(metrics: Mapping[str, Any]) -> list[str]:
    """Paragraphs on what a demo's numbers show, do not show, and, where an interval includes chance, leave open."""
    sentences = [_of_judge(metrics), _of_pick(metrics), _of_pixels(metrics)]
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


# -- the values per prompt

NAMES = ("accuracy", "candidates", "picks", "attention")
COSTS = ("denoiser_rows", "vae_decodes", "head_calls", "seconds")
Contests = Sequence[contest.Record]  # one per prompt
Values = list[dict[str, Any]]  # rows of a file


def write_values(
    folder: Path, measured: Sequence[Measurement], records: Mapping[str, Contests], head_seeds: Sequence[int]
) -> None:
    """Write the four files to `folder`, which is made. `records`: the contests by set; `head_seeds`: their judges'."""
    folder.mkdir(parents=True)
    tables = (
        [row for each in measured for row in _accuracy_rows(each)],
        [row for name, some in records.items() for row in _candidate_rows(name, some, head_seeds)],
        [row for name, some in records.items() for row in _pick_rows(name, some, head_seeds)],
        [row for name, some in records.items() for row in _attention_rows(name, some)],
    )
    for name, rows in zip(NAMES, tables):
        table = pa.Table.from_pylist(rows)
        small = [field.with_type(pa.float32()) if field.name.startswith("final ") else field for field in table.schema]
        pq.write_table(table.cast(pa.schema(small)), folder / f"{name}.parquet", compression="zstd")


def recomputed(folder: Path, metrics: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield each interval of a demo's metrics as (its field, its value there, its value from the files in `folder`).

    Raises:
        PrismError: for a file that is missing or cannot be read.
    """
    accuracy, candidates, picks, looks = (_read(folder / f"{name}.parquet") for name in NAMES)
    seed = metrics["seed"]
    counts: dict[tuple[Any, ...], Values] = {}
    for row in accuracy:
        key = (row["set"], row["judge"], row["head_seed"], float(row["t"]), row["dimension"])
        counts.setdefault(key, []).append(row)
    for number, row in enumerate(metrics["accuracy"]):
        where = f"accuracy[{number}].without_ties_ci95"
        yield where, row["without_ties_ci95"], _accuracy_interval(row, counts, seed)
    for number, row in enumerate(metrics.get("judge_comparison", [])):
        measured_on = (row["set"], float(row["t"]), row["dimension"])
        left, right = (
            [rows for name, rows in counts.items() if name[1] == judge and (name[0], *name[3:]) == measured_on]
            for judge in (row["judge"], row["against"])
        )
        columns = np.stack([_right(left) - _right(right), _decided(left[0])], 1)
        prompts = [entry["prompt"] for entry in left[0]]
        yield f"judge_comparison[{number}].ci95", row["ci95"], _of_decided(columns, prompts, seed)
    values = _values(candidates)
    for number, row in enumerate(metrics["best_of_n"]):
        prompts, columns = _gains(row, values, picks)
        for name, statistic in (("referee_gain", contest.in_spreads), ("oracle_share", contest.of_oracle)):
            where = f"best_of_n[{number}].{name}_ci95"
            yield where, row[f"{name}_ci95"], prompt_interval(columns, prompts, statistic, seed)
    for number, row in enumerate(metrics.get("attention", [])):
        some = [entry for entry in looks if (entry["t"], entry["candidates"]) == (row["t"], row["candidates"])]
        some = [entry for entry in some if entry["set"] == "test"]
        columns = np.array([[entry["attention"], entry["area"]] for entry in some])
        prompts = [entry["prompt"] for entry in some]
        yield (
            f"attention[{number}].lift_ci95",
            row["lift_ci95"],
            prompt_interval(columns, prompts, ratio, seed),
        )


def _accuracy_rows(measured: Measurement) -> Iterator[dict[str, Any]]:
    judge, head_seed = measured.rows[0]["judge"], measured.rows[0]["head_seed"]
    tallies: dict[tuple[Any, ...], list[int]] = {}
    columns = (measured.pairs[name].to_pylist() for name in ("t", "dimension", "prompt", "label", "margin"))
    for t, dimension, prompt, label, margin in zip(*columns, strict=True):
        tally = tallies.setdefault((t, dimension, prompt), [0, 0, 0])
        for column, counted in enumerate((True, label != 0, label * margin > 0)):
            tally[column] += counted
    for (t, dimension, prompt), (pairs, decided, right) in tallies.items():
        whose = {"set": measured.settings["split"], "judge": judge, "head_seed": head_seed}
        counts = {"pairs": pairs, "decided": decided, "right": right}
        yield {**whose, "t": t, "dimension": dimension, "prompt": prompt, **counts}


def _candidate_rows(which: str, records: Contests, head_seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    for record in records:
        for candidate, seed in enumerate(record["seeds"]):
            scores = {name: values[candidate] for name, values in record["values"].items()}
            judged = {
                f"final {head_seed}": values[candidate]
                for head_seed, values in zip(head_seeds, record["final"], strict=True)
            }
            yield {"set": which, "prompt": record["prompt"], "candidate": candidate, "seed": seed, **scores, **judged}


def _pick_rows(which: str, records: Contests, head_seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    for record in records:
        for name, picks in record["picks"].items():
            judged = kind_of(name.split()[0]).needs_judge()
            separate_runs = record.get("alone", {}).get(name, [])
            for k, head_seed in enumerate(head_seeds if judged else [None]):
                costs = separate_runs[k]["ledger"] if separate_runs else {}
                pick = picks[k]
                yield {"set": which, "prompt": record["prompt"], "strategy": name, "head_seed": head_seed,
                       "candidate": pick, "seed": record["seeds"][pick],
                       **{cost: costs.get(cost) for cost in COSTS}}  # fmt: skip


def _attention_rows(which: str, records: Contests) -> Iterator[dict[str, Any]]:
    for record in records:
        for t, shares in record["looks"].items():
            for name, choose in CHOSEN.items():
                share = shares[int(choose(record["values"]["overall"]))]
                parts = {part: share[part] for part in ("attention", "area")}
                yield {"set": which, "prompt": record["prompt"], "t": float(t), "candidates": name, **parts}


def _read(path: Path) -> Values:
    try:
        return list(pq.read_table(path).to_pylist())
    except (OSError, pa.ArrowException) as error:
        raise PrismError(f"The file {path} cannot be read as Parquet ({error}); write it anew.") from None


def _accuracy_interval(row: Mapping[str, Any], counts: Mapping[tuple[Any, ...], Values], seed: int) -> Any:
    several = row.get("head_seeds") or [row["head_seed"]]
    by_seed = [counts[row["set"], row["judge"], head_seed, float(row["t"]), row["dimension"]] for head_seed in several]
    columns = np.stack([_right(by_seed), _decided(by_seed[0])], 1)
    # A bootstrap sorts its clusters: by prompt for the mean over seeds, by the store's order for a single judge.
    names = [entry["prompt"] if row.get("head_seeds") else number for number, entry in enumerate(by_seed[0])]
    return _of_decided(columns, names, seed)


def _of_decided(columns: np.ndarray, prompts: Sequence[Any], seed: int) -> list[float] | None:
    kept = columns[:, 1] > 0
    return prompt_interval(columns[kept], np.array(prompts)[kept], ratio, seed)


def _right(several: Sequence[Values]) -> np.ndarray:
    return np.mean([[entry["right"] for entry in rows] for rows in several], 0)


def _decided(rows: Values) -> np.ndarray:
    return np.array([entry["decided"] for entry in rows])


def _values(candidates: Values) -> dict[str, dict[str, np.ndarray]]:
    values: dict[str, dict[str, list[float]]] = {}
    for row in candidates:
        values.setdefault(row["set"], {}).setdefault(row["prompt"], []).append(row["overall"])
    return {which: {prompt: np.array(scores) for prompt, scores in some.items()} for which, some in values.items()}


def _gains(
    row: Mapping[str, Any], values: Mapping[str, Mapping[str, np.ndarray]], picks: Values
) -> tuple[list[str], np.ndarray]:
    several = row.get("head_seeds") or [row["head_seed"]]
    scores = values[row["set"]]
    gain = dict.fromkeys(scores, 0.0)
    for entry in picks:
        if (entry["set"], entry["strategy"]) == (row["set"], row["name"]) and entry["head_seed"] in several:
            candidates = scores[entry["prompt"]]
            gain[entry["prompt"]] += float(candidates[entry["candidate"]] - candidates.mean()) / len(several)
    prompts = list(scores)
    matrix = np.stack([scores[prompt] for prompt in prompts])
    gains = np.array([gain[prompt] for prompt in prompts])
    return prompts, contest.columns(gains, matrix)
