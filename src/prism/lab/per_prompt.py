"""Values per prompt behind every interval of a demo, as small Parquet files, and the intervals recomputed from them.

accuracy.parquet, a row per set, judge, head_seed, t, dimension and prompt: pairs, decided (those that are no tie) and
    right (of the decided). Prompts stand in the order of the store.
candidates.parquet, a row per set, prompt and candidate: its seed, the referee's scores, and "final SEED", the overall
    score of its finished latents by the judge of that head seed.
picks.parquet, a row per set, prompt, strategy and head_seed (null where nothing judged): the picked candidate and its
    seed, and, where the strategy was also run by itself, what that run cost.
attention.parquet, a row per set, prompt, t and candidates (best or worst by the referee): shares of the attention.
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
from prism.lab import attention as gaze
from prism.lab import contest
from prism.sampling.strategies import kind_of

NAMES = ("accuracy", "candidates", "picks", "attention")
COSTS = ("denoiser_rows", "vae_decodes", "head_calls", "seconds")
Contests = Sequence[contest.Record]  # one per prompt
Rows = list[dict[str, Any]]


def write(
    folder: Path, measured: Sequence[Measurement], records: Mapping[str, Contests], head_seeds: Sequence[int]
) -> None:
    """Write the four files to `folder`, which is made. `records`: the contests by set; `head_seeds`: their judges'."""
    folder.mkdir(parents=True)
    tables = (
        [row for each in measured for row in _counts(each)],
        [row for name, some in records.items() for row in _candidates(name, some, head_seeds)],
        [row for name, some in records.items() for row in _picks(name, some, head_seeds)],
        [row for name, some in records.items() for row in _attention(name, some)],
    )
    for name, rows in zip(NAMES, tables):
        table = pa.Table.from_pylist(rows)
        small = [field.with_type(pa.float32()) if field.name.startswith("final ") else field for field in table.schema]
        pq.write_table(table.cast(pa.schema(small)), folder / f"{name}.parquet", compression="zstd")


def recomputed(folder: Path, metrics: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Each interval of a demo's metrics: where it stands, what stands there, and what the files in `folder` give.

    Raises:
        PrismError: for a file that is missing or cannot be read.
    """
    accuracy, candidates, picks, attention = (_read(folder / f"{name}.parquet") for name in NAMES)
    seed = metrics["seed"]
    counts: dict[tuple[Any, ...], Rows] = {}
    for row in accuracy:
        key = (row["set"], row["judge"], row["head_seed"], float(row["t"]), row["dimension"])
        counts.setdefault(key, []).append(row)
    for number, row in enumerate(metrics["accuracy"]):
        where = f"accuracy[{number}].without_ties_ci95"
        yield where, row["without_ties_ci95"], _accuracy_interval(row, counts, seed)
    for number, row in enumerate(metrics.get("judge_comparison", [])):
        place = (row["set"], float(row["t"]), row["dimension"])
        left, right = (
            [rows for name, rows in counts.items() if name[1] == judge and (name[0], *name[3:]) == place]
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
        some = [entry for entry in attention if (entry["t"], entry["candidates"]) == (row["t"], row["candidates"])]
        some = [entry for entry in some if entry["set"] == "test"]
        columns = np.array([[entry["attention"], entry["area"]] for entry in some])
        prompts = [entry["prompt"] for entry in some]
        yield f"attention[{number}].lift_ci95", row["lift_ci95"], prompt_interval(columns, prompts, gaze.ratio, seed)


def _counts(measured: Measurement) -> Iterator[dict[str, Any]]:
    judge, head_seed = measured.rows[0]["judge"], measured.rows[0]["head_seed"]
    found: dict[tuple[Any, ...], list[int]] = {}
    columns = (measured.pairs[name].to_pylist() for name in ("t", "dimension", "prompt", "label", "margin"))
    for t, dimension, prompt, label, margin in zip(*columns, strict=True):
        tally = found.setdefault((t, dimension, prompt), [0, 0, 0])
        for place, counted in enumerate((True, label != 0, label * margin > 0)):
            tally[place] += counted
    for (t, dimension, prompt), (pairs, decided, right) in found.items():
        whose = {"set": measured.settings["split"], "judge": judge, "head_seed": head_seed}
        counts = {"pairs": pairs, "decided": decided, "right": right}
        yield {**whose, "t": t, "dimension": dimension, "prompt": prompt, **counts}


def _candidates(which: str, records: Contests, head_seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    for record in records:
        for candidate, seed in enumerate(record["seeds"]):
            scores = {name: values[candidate] for name, values in record["values"].items()}
            judged = {
                f"final {own}": values[candidate] for own, values in zip(head_seeds, record["final"], strict=True)
            }
            yield {"set": which, "prompt": record["prompt"], "candidate": candidate, "seed": seed, **scores, **judged}


def _picks(which: str, records: Contests, head_seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    for record in records:
        for name, picks in record["picks"].items():
            judged = kind_of(name.split()[0]).needs_judge()
            alone = record.get("alone", {}).get(name, [])
            for place, head_seed in enumerate(head_seeds if judged else [None]):
                costs = alone[place]["ledger"] if alone else {}
                pick = picks[place]
                yield {"set": which, "prompt": record["prompt"], "strategy": name, "head_seed": head_seed,
                       "candidate": pick, "seed": record["seeds"][pick],
                       **{cost: costs.get(cost) for cost in COSTS}}  # fmt: skip


def _attention(which: str, records: Contests) -> Iterator[dict[str, Any]]:
    for record in records:
        for t, shares in record["looks"].items():
            for name, choose in gaze.CHOSEN.items():
                share = shares[int(choose(record["values"]["overall"]))]
                own = {part: share[part] for part in ("attention", "area")}
                yield {"set": which, "prompt": record["prompt"], "t": float(t), "candidates": name, **own}


def _read(path: Path) -> Rows:
    try:
        return list(pq.read_table(path).to_pylist())
    except (OSError, pa.ArrowException) as error:
        raise PrismError(f"The file {path} cannot be read as Parquet ({error}); write it anew.") from None


def _accuracy_interval(row: Mapping[str, Any], counts: Mapping[tuple[Any, ...], Rows], seed: int) -> Any:
    several = row.get("head_seeds") or [row["head_seed"]]
    found = [counts[row["set"], row["judge"], own, float(row["t"]), row["dimension"]] for own in several]
    columns = np.stack([_right(found), _decided(found[0])], 1)
    # what is resampled has an order, and a single judge's prompts are numbered as the store has them
    names = [entry["prompt"] if row.get("head_seeds") else place for place, entry in enumerate(found[0])]
    return _of_decided(columns, names, seed)


def _of_decided(columns: np.ndarray, prompts: Sequence[Any], seed: int) -> list[float] | None:
    kept = columns[:, 1] > 0
    return prompt_interval(columns[kept], np.array(prompts)[kept], gaze.ratio, seed)


def _right(several: Sequence[Rows]) -> np.ndarray:
    return np.mean([[entry["right"] for entry in rows] for rows in several], 0)


def _decided(rows: Rows) -> np.ndarray:
    return np.array([entry["decided"] for entry in rows])


def _values(candidates: Rows) -> dict[str, dict[str, np.ndarray]]:
    found: dict[str, dict[str, list[float]]] = {}
    for row in candidates:
        found.setdefault(row["set"], {}).setdefault(row["prompt"], []).append(row["overall"])
    return {which: {prompt: np.array(scores) for prompt, scores in some.items()} for which, some in found.items()}


def _gains(
    row: Mapping[str, Any], values: Mapping[str, Mapping[str, np.ndarray]], picks: Rows
) -> tuple[list[str], np.ndarray]:
    several = row.get("head_seeds") or [row["head_seed"]]
    scores = values[row["set"]]
    gain = dict.fromkeys(scores, 0.0)
    for entry in picks:
        if (entry["set"], entry["strategy"]) == (row["set"], row["name"]) and entry["head_seed"] in several:
            own = scores[entry["prompt"]]
            gain[entry["prompt"]] += float(own[entry["candidate"]] - own.mean()) / len(several)
    prompts = list(scores)
    matrix = np.stack([scores[prompt] for prompt in prompts])
    gains = np.array([gain[prompt] for prompt in prompts])
    return prompts, contest.columns(gains, matrix)
