"""Recorded candidates scored once wherever a plan may look, as a table that is saved and read."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor
from tqdm import tqdm

from prism import files
from prism.backbone.arguments import normalised
from prism.backbone.fingerprint import fits
from prism.clips import CLIP_FACTS
from prism.errors import PrismError, quoted
from prism.judge import Judge
from prism.judge.scoring import head_digest
from prism.preference import LatentStore
from prism.preference.pairs import prompt_key
from prism.preference.shards import INDEX, ROW_COLUMNS
from prism.preference.store import store_identity
from prism.runs import Clock, Parts
from prism.sampling.arguments import weights_over
from prism.sampling.plan import Workload, judging_noise
from prism.sampling.planner import Reading, Table
from prism.team import in_batches

FORMAT, SCHEMA = "prism-candidate-scores", 1
FEWEST = 20
"""Fewest prompts: one half chooses plans and the other reports them, and an interval takes ten."""


@dataclass(frozen=True, eq=False)
class Recorded:
    """Candidates of some prompts, with rewards of their finished videos and a judge's scores.

    prompts: (P,) texts. seeds: (P, n) int64. rewards: by name, (P, n) float64. scores: by reading, (P, n, D) float64.
    about: facts of the judge (dimensions, head), backbone, call, workload, and of how it was scored.
    """

    prompts: tuple[str, ...]
    seeds: np.ndarray
    rewards: Mapping[str, np.ndarray]
    scores: Mapping[Reading, np.ndarray]
    about: dict[str, Any]

    @property
    def load(self) -> Workload:
        """The part of a run's cost that its plan does not decide."""
        fields = self.about["workload"]
        return Workload(
            self.seeds.shape[1], tuple(fields["calls"]), fields["cfg"], fields["tap_share"], listens=fields["listens"]
        )

    def reward(self, by: str) -> np.ndarray:
        """(P, n) the rewards by one name; where there is no "overall", that is the mean of all."""
        if self.mean_of(by):
            return np.asarray(np.mean(list(self.rewards.values()), 0))
        if by not in self.rewards:
            raise PrismError(f"The store has no reward {quoted(by, 60)} for --by; it has {', '.join(self.rewards)}.")
        return self.rewards[by]

    def mean_of(self, by: str) -> list[str]:
        """The rewards whose mean is the reward "overall", where a store has none of that name; [] for all others."""
        return list(self.rewards) if by == "overall" and by not in self.rewards else []

    def table(self, by: str, select_by: str | Mapping[str, float] = "overall") -> Table:
        """What planning needs: one value and, by reading, one deciding score per candidate."""
        names = self.about["dimensions"]
        weights = weights_over(names, select_by, "judge")
        column = np.array([weights.get(name, 0.0) for name in names])
        return Table(self.reward(by), {reading: scores @ column for reading, scores in self.scores.items()})

    def of(self, rows: Sequence[int]) -> Recorded:
        """The same of some prompts, by index."""
        some = np.asarray(rows, dtype=np.int64)
        return Recorded(
            tuple(self.prompts[row] for row in rows),
            self.seeds[some],
            {name: values[some] for name, values in self.rewards.items()},
            {reading: values[some] for reading, values in self.scores.items()},
            self.about,
        )

    def save(self, path: Path) -> None:
        """Write everything as one Parquet file, a row per candidate."""
        count = self.seeds.shape[1]
        columns: dict[str, Any] = {
            "prompt": [prompt for prompt in self.prompts for _ in range(count)],
            "seed": self.seeds.ravel(),
        }
        columns |= {f"reward/{name}": values.ravel() for name, values in self.rewards.items()}
        for (look, step, t, draw), values in self.scores.items():
            for index, name in enumerate(self.about["dimensions"]):
                columns[f"{look}/{step}/{t:g}/{draw}/{name}"] = values[..., index].ravel()
        about = {"format": FORMAT, "schema": SCHEMA, "candidates": count, "about": self.about}
        with files.new_file(path) as work:
            table = pa.table(columns).replace_schema_metadata({"prism": json.dumps(about)})
            encodings = {each.name: "BYTE_STREAM_SPLIT" for each in table.schema if pa.types.is_floating(each.type)}
            pq.write_table(table, work, compression="zstd", use_dictionary=["prompt"], column_encoding=encodings)

    @classmethod
    def load_file(cls, path: Path) -> Recorded:
        """Read a file that `save` wrote. Raises PrismError for one that is missing or is not such a file."""
        try:
            extra = json.loads((pq.read_schema(path).metadata or {})[b"prism"])
            if (extra["format"], extra["schema"]) != (FORMAT, SCHEMA):
                raise PrismError(f"it is {extra['format']!r} of schema {extra['schema']!r}")
            return cls._read(pq.read_table(path), int(extra["candidates"]), extra["about"])
        except Exception as error:  # pyarrow and json raise many kinds on foreign files
            raise PrismError(
                f"The file {quoted(str(path), 150)} holds no scores that prism plan left ({quoted(error, 150)}); "
                "score anew, with --data."
            ) from error

    @classmethod
    def _read(cls, table: pa.Table, count: int, about: dict[str, Any]) -> Recorded:
        def column(name: str) -> np.ndarray:
            values: np.ndarray = table[name].to_numpy(zero_copy_only=False).reshape(-1, count)
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise PrismError(f"its column {name} holds NaN")
            return values

        rewards, parts = {}, dict[Reading, list[np.ndarray]]()
        for name in table.column_names:
            kind, _, rest = name.partition("/")
            if kind == "reward":
                rewards[rest] = column(name)
            elif kind in ("now", "ahead", "finished"):
                step, t, draw, _ = rest.split("/", 3)
                parts.setdefault(Reading(kind, int(step), float(t), int(draw)), []).append(column(name))  # type: ignore[arg-type]
        scores = {reading: np.stack(values, -1) for reading, values in parts.items()}
        if not rewards or not scores or any(s.shape[-1] != len(about["dimensions"]) for s in scores.values()):
            raise PrismError("its rewards or scores are missing")
        loaded = cls(tuple(table["prompt"].to_pylist()[::count]), column("seed"), rewards, scores, about)
        if sum(loaded.load.calls) <= 0:
            raise PrismError("its workload has no steps")
        return loaded


def candidates_of(store: LatentStore, split: str, trained_on: Sequence[str]) -> tuple[dict[str, pa.Table], str]:
    """The candidates of each prompt (video, seed, rewards) that can be compared, and in words which are left out.

    They are of one number per prompt, the most frequent one. Prompts that the head was trained on (`prompt_key`s) are
    left out. Raises PrismError for a store without trajectories, without labels, or with too few prompts.
    """
    where = f"The store {files.shown(store.folder)}"
    if store.meta.get("command") == "prism collect" and not (store.folder / INDEX).is_file():
        raise PrismError(
            f"{where} is unfinished: its prism collect was stopped after {len(store.videos)} videos; run that command "
            "again with --resume, and plan then."
        )
    if not store.has_trajectories or not _steps(store):
        raise PrismError(f"{where} holds no trajectories; collect candidates with prism collect --states 2,3,4,5,6.")
    if not reward_columns(store):
        raise PrismError(f"{where} has no labels; have a reward label it: prism collect --label --reward ... --out it.")
    names = reward_columns(store)
    rows = store.videos.select(["video", "prompt", "split", "seed", *names])
    grouped: dict[str, list[int]] = {}
    seen, keys = set[str](), set(trained_on)
    for number, row in enumerate(rows.to_pylist()):
        if split not in (row["split"], "all"):
            continue
        if prompt_key(row["prompt"]) in keys:
            seen.add(row["prompt"])
        elif all(row[name] is not None and np.isfinite(row[name]) for name in names):
            grouped.setdefault(row["prompt"], []).append(number)
    counts = Counter(len(numbers) for numbers in grouped.values())
    common = max(counts, key=lambda count: (counts[count], count), default=0)
    kept = {prompt: rows.take(numbers) for prompt, numbers in grouped.items() if len(numbers) == common}
    if len(kept) < FEWEST or common < 2:
        raise PrismError(
            f"{where} has {len(kept)} prompts with {common} labelled candidates in the split {quoted(split, 40)} that "
            f"the head was not trained on{f' ({len(seen)} that it was trained on are left out)' if seen else ''}; half "
            f"of them choose a plan and half report it, which takes {FEWEST} or more of 2 or more candidates: collect "
            "more."
        )
    parts = [
        f"{len(seen)} prompt{'s' * (len(seen) > 1)} that the head was trained on" if seen else "",
        f"{len(grouped) - len(kept)} with another number of candidates than {common}"
        if len(kept) < len(grouped)
        else "",
    ]
    words = " and ".join(part for part in parts if part)
    return kept, f"{words}; {len(kept)} remain" if words else ""


def check_choice(store: LatentStore, judge: Judge, by: str, select_by: Mapping[str, float]) -> None:
    """Refuse, before the work, a reward that the store lacks and a dimension that the judge lacks."""
    nothing = np.zeros((0, 0))
    rewards = dict.fromkeys(reward_columns(store), nothing)
    Recorded((), nothing, rewards, {}, {"dimensions": list(judge.dimensions)}).table(by, select_by)


def reward_columns(store: LatentStore) -> list[str]:
    """The columns of a store's videos that hold rewards: its labelled dimensions, and an overall beside them."""
    known = {*ROW_COLUMNS, *CLIP_FACTS, "video", "prompt", "split", "seed", "shard", "row"}
    return [
        field.name
        for field in store.videos.schema
        if field.name not in known and (pa.types.is_floating(field.type) or pa.types.is_integer(field.type))
    ]


def _steps(store: LatentStore) -> list[int]:
    steps = (store.meta.get("key") or {}).get("states")
    return [step for step in steps if isinstance(step, int)] if isinstance(steps, list) else []


def facts(
    judge: Judge, store: LatentStore, levels: Sequence[float], num_draws: int, seed: int, split: str
) -> dict[str, Any]:
    """`Recorded.about`: what the scores depend on, and the workload. Raises PrismError for another backbone's store."""
    backbone, call = judge.backbone, normalised(store.call)
    refusals, differences = fits(store.meta.get("backbone") or {}, backbone)
    if refusals:
        was, present = refusals[0]
        raise PrismError(
            f"The store {files.shown(store.folder)} is of the {was}, and the backbone has {present}; name the backbone "
            "that it was collected with."
        )
    for clause in differences:
        warnings.warn(f"The store {files.shown(store.folder)} was collected with {clause}.", stacklevel=2)
    prompt = store.videos["prompt"][0].as_py()
    first = store.videos["video"][0].as_py()
    rows = backbone.batch([prompt], [0], normalised(store.call_of(first)))
    steps = backbone.steps({**normalised(store.call_of(first)), **rows, "output_type": "latent"})
    load = Workload.of(backbone, call, 1, judge.tap, steps)
    return {
        "dimensions": list(judge.dimensions),
        "head": head_digest(judge),
        "family": backbone.family.name,
        "backbone": backbone.fingerprint(),
        "call": store.call,
        "num_inference_steps": backbone.num_inference_steps(call),
        "workload": {
            "calls": list(load.calls),
            "cfg": load.cfg,
            "tap_share": load.tap_share,
            "listens": load.listens,
            "readable": list(steps.readable),
        },
        "store": store_identity(store),
        "split": split,
        "states": _steps(store),
        "levels": list(levels),
        "num_draws": num_draws,
        "seed": seed,
    }


def score(
    judge: Judge,
    store: LatentStore,
    by_prompt: Mapping[str, pa.Table],
    about: dict[str, Any],
    parts: Parts,
    batch_size: int = 64,
    progress: bool = True,
) -> Recorded:
    """Score every recorded latent of the candidates, prompt by prompt; prompts that `parts` holds are not scored again.

    Noise is that of a `best_of_n` run with the seed `about["seed"]`, the same for all candidates of a prompt, so that
    a plan picks here what that run picks. A prompt whose latents the judge refuses is left out, with a warning.
    """
    names, scored = reward_columns(store), list[Recorded]()
    refused: list[str] = []
    clock = Clock("scoring", len(by_prompt))
    with tqdm(total=len(by_prompt), desc="scoring", unit="prompt", disable=None if progress else True) as bar:
        for number, (prompt, rows) in enumerate(by_prompt.items()):
            name = f"{number:06d}-{prompt_key(prompt)[:12]}.parquet"
            present = parts.has(name)
            try:
                make = partial(_score_prompt, judge, store, prompt, rows, about, names, batch_size)
                scored.append(parts.piece(name, make, Recorded.load_file))
            except PrismError as error:
                refused.append(f"{quoted(prompt, 80)} ({str(error).rstrip('.')})")
            bar.update()
            clock.tick(number + 1, not present)
    if len(scored) < FEWEST:
        raise PrismError(f"The judge scored {len(scored)} of {len(by_prompt)} prompts; it refuses {refused[0]}.")
    if refused:
        warnings.warn(f"{len(refused)} prompts are left out, which the judge refuses: {refused[0]}.", stacklevel=2)
    return Recorded(
        tuple(each.prompts[0] for each in scored),
        np.concatenate([each.seeds for each in scored]),
        {name: np.concatenate([each.rewards[name] for each in scored]) for name in names},
        {reading: np.concatenate([each.scores[reading] for each in scored]) for reading in scored[0].scores},
        about,
    )


def _score_prompt(
    judge: Judge, store: LatentStore, prompt: str, rows: pa.Table, about: dict[str, Any], names: Sequence[str],
    batch_size: int, path: Path,
) -> None:  # fmt: skip
    """Score the candidates of one prompt, and write them as a `Recorded` of one."""
    videos: list[str] = rows["video"].to_pylist()
    seeds = rows["seed"].to_pylist()
    call = normalised(store.call_of(videos[0]))
    drawn = judge.backbone.draws_conditions(call)
    scores: dict[Reading, np.ndarray] = {}

    def fill(reading: Reading, batch: Sequence[int], values: Tensor) -> None:
        column = scores.setdefault(reading, np.full((1, len(videos), len(judge.dimensions)), np.nan))
        column[0, list(batch)] = values.double().cpu().numpy()

    def conditions(batch: Sequence[int]) -> dict[str, Any]:
        return {**call, **({"seeds": [seeds[row] for row in batch]} if drawn else {})}

    def now(step: int, states: Tensor, t: float, batch: Sequence[int]) -> None:
        values = judge.score(
            states[list(batch)].to(judge.backbone.device), [prompt] * len(batch), t, **conditions(batch)
        )
        fill(Reading("now", step, round(t, 3), 0), batch, values)

    def clean(look: Any, step: int, latents: Tensor, t: float, batch: Sequence[int]) -> None:
        generator = judging_noise(about["seed"])
        for draw in range(about["num_draws"]):  # of one generator, so that the first m are those of num_draws=m
            texts = [prompt] * len(batch)
            values, _ = judge.score_clean(
                latents[list(batch)], texts, t, num_draws=1, generator=generator, **conditions(batch)
            )
            fill(Reading(look, step, float(t), draw), batch, values)

    everyone = range(len(videos))
    with judge.backbone.held(), judge.backbone.freed():
        for index, step in enumerate(about["states"]):
            if step > 1 and about["workload"]["readable"][step - 1]:  # before step 1 there is pure noise
                states, t = store.trajectory(videos, index)
                in_batches(everyone, batch_size, partial(now, step, states, float(t[0])), "scoring")
            if store.has_predicted:
                predicted, _ = store.predicted(videos, index)
                for level in about["levels"]:
                    in_batches(everyone, batch_size, partial(clean, "ahead", step, predicted, level), "scoring")
        latents = store.latents(videos)
        for level in about["levels"]:
            in_batches(everyone, batch_size, partial(clean, "finished", 0, latents, level), "scoring")
    rewards = {name: rows[name].cast(pa.float64()).to_numpy(zero_copy_only=False)[None] for name in names}
    Recorded((prompt,), np.array([seeds], dtype=np.int64), rewards, scores, about).save(path)
