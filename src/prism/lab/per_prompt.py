"""The values per prompt of a run, from which its intervals can be recomputed.

They are Parquet files in the run's folder `per_prompt`:

accuracy, a row per set, judge, head_seed, t, dimension and prompt: the numbers of pairs, of decided pairs (no ties),
    and of pairs judged right among these. Prompts are in the order of the store, which `recomputed` relies on.
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

from prism.errors import PrismError
from prism.evaluation import Measurement, prompt_interval
from prism.lab import contest
from prism.lab.attention import CHOSEN, ratio
from prism.sampling.strategies import kind_of

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
    """Yield each interval of a demo's metrics as (field, value in the metrics, value from the files in `folder`).

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
    with_decided = columns[:, 1] > 0
    return prompt_interval(columns[with_decided], np.array(prompts)[with_decided], ratio, seed)


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
