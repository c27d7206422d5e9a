"""A model measured on test prompts: the judge that selects, one that does not, rewards, diversity and motion.

All models sample the same prompts with the same seeds, so that differences are paired, by prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prism.backbone import Backbone
from prism.evaluation.intervals import prompt_interval
from prism.judge import Judge
from prism.judge.scoring import head_digest
from prism.preference import LatentStore
from prism.preference.pairs import read_table
from prism.rewards.picks import Group, decisive, groups_of, judged
from prism.rewards.settings import ImproveConfig
from prism.training.labels import Decoder
from prism.training.reward import Reward

JUDGE, OUTER, DIVERSITY, MOTION = "judge", "outer", "diversity", "motion"


@dataclass(frozen=True)
class Outer:
    """A second judge, which never selects: a name for reports, and a function that scores finished latents.

    score: (latents (B, ...), prompts, call, seeds) -> (B,) floats. trained_on: keys of the prompts that it was trained
    on (`prism.preference.prompt_key`). judge: the judge that scores, where it is one with a head. digest: of its files;
    a run that began with others is not continued.
    """

    name: str
    score: Callable[[Tensor, Sequence[str], Mapping[str, Any], Sequence[int]], Sequence[float]]
    trained_on: Collection[str] = ()
    judge: Judge | None = None
    digest: str = ""

    def is_judge(self, judge: Judge) -> bool:
        """True if it is this judge: the same heads on the same backbone."""
        if self.judge is None or head_digest(self.judge) != head_digest(judge):
            return False
        mine, other = self.judge.backbone, judge.backbone
        return mine is other or mine.fingerprint()["weights"] == other.fingerprint()["weights"]


def judge_outer(judge: Judge, config: ImproveConfig, levels: Sequence[float], name: str = "") -> Outer:
    """Another head on the same backbone as the outer judge."""
    weights = torch.tensor(decisive(judge, ""), dtype=torch.float64)

    def score(
        latents: Tensor, prompts: Sequence[str], call: Mapping[str, Any], seeds: Sequence[int]
    ) -> Sequence[float]:
        total = torch.zeros(len(latents), dtype=torch.float64)
        for level in levels:
            generator = torch.Generator().manual_seed(config.seed)
            mean, _ = judge.score_clean(latents, list(prompts), level, config.num_draws, generator, **call)
            total += mean.double().cpu() @ weights / len(levels)
        scores: list[float] = total.tolist()
        return scores

    keys = judge.trained_on.get("prompt_keys") or ()
    return Outer(name or "another head", score, frozenset(keys), judge, head_digest(judge))


def other_outer(judge: Judge, backbone: Any, call: Mapping[str, Any], config: ImproveConfig, name: str = "") -> Outer:
    """A head on another backbone as the outer judge: videos are decoded by `backbone` and encoded by the head's own.

    call: of the other backbone's pipeline.
    """
    decoder, weights = Decoder(backbone), np.array(decisive(judge, ""))

    def score(
        latents: Tensor, prompts: Sequence[str], of_video: Mapping[str, Any], seeds: Sequence[int]
    ) -> Sequence[float]:
        videos = [decoder.frames(each[None], p, of_video, s) for each, p, s in zip(latents, prompts, seeds)]
        scores = judge.score_video(videos, list(prompts), None, config.num_draws, config.seed, **call).scores
        return [float(np.dot(weights, row)) for row in scores.mean(1).tolist()]

    keys = frozenset(judge.trained_on.get("prompt_keys") or ())
    return Outer(name or "a head on another backbone", score, keys, judge, head_digest(judge))


def reward_outer(reward: Reward, backbone: Any, fps: float | None = None) -> Outer:
    """A reward function or a teacher, which scores decoded videos, as the outer judge: the mean of its dimensions."""
    decoder = Decoder(backbone)

    def score(
        latents: Tensor, prompts: Sequence[str], call: Mapping[str, Any], seeds: Sequence[int]
    ) -> Sequence[float]:
        videos = [decoder.frames(each[None], p, call, s) for each, p, s in zip(latents, prompts, seeds)]
        return [float(np.mean(list(row.values()))) for row in reward.score(videos, prompts, fps)]

    return Outer(reward.name, score, digest=reward.version)


def columns(
    store: LatentStore, judge: Judge, outer: Outer | None, rewards: Sequence[Reward], config: ImproveConfig,
    levels: Sequence[float],
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Each measure of each video of a test store, by measure and video; the backbone must have no adapter on."""
    weights = np.array(decisive(judge, config.dimension))
    scores = judged(judge, store, config, levels)
    table: dict[str, dict[str, float]] = {JUDGE: {v: float(np.dot(weights, row)) for v, row in scores.items()}}
    groups, videos = groups_of(store), store.videos
    ids = videos["video"].to_pylist()
    if outer is not None:
        seeds = dict(zip(ids, videos["seed"].to_pylist()))
        table[OUTER] = {}
        for group in groups:
            for start in range(0, len(group.videos), config.max_rows):
                part = group.videos[start : start + config.max_rows]
                call, latents = store.call_of(part[0]), store.latents(part)
                values = outer.score(latents, [group.prompt] * len(part), call, [seeds[each] or 0 for each in part])
                table[OUTER] |= {video: float(value) for video, value in zip(part, values)}
    for reward in rewards:
        parts = {name: {**dict.fromkeys(ids, np.nan), **by_video} for name, by_video in _ratings(store, reward).items()}
        scored = np.array([list(by_video.values()) for by_video in parts.values()])
        table[reward.name] = dict(zip(ids, scored.mean(0).tolist()))
        table |= {f"{reward.name}.{name}": part for name, part in parts.items()} if len(parts) > 1 else {}
    if "clip_motion" in videos.column_names:
        table[MOTION] = dict(zip(ids, videos["clip_motion"].to_pylist()))
    table[DIVERSITY] = {}
    for group in groups:
        table[DIVERSITY] |= dict.fromkeys(group.videos, diversity(store.latents(group.videos)))
    return table


def _ratings(store: LatentStore, reward: Reward) -> dict[str, dict[str, float]]:
    """The scores that a reward gave a store's videos, by dimension and video."""
    ratings = read_table(store.folder / "ratings.parquet", ("video", "dimension", "annotator")).to_pylist()
    by_dimension: dict[str, dict[str, float]] = {}
    for row in ratings:
        if row["annotator"] == reward.name:
            name = str(row["dimension"]).removeprefix(f"{reward.name}.")
            by_dimension.setdefault(name, {})[row["video"]] = np.nan if row["score"] is None else row["score"]
    return by_dimension


def diversity(latents: Tensor) -> float:
    """Mean root mean squared difference between the latents (N, ...) of a prompt's videos; 0 for one."""
    flat = latents.flatten(1).double()
    pairs = [(a - b).square().mean().sqrt() for a, b in combinations(flat, 2)]
    return float(torch.stack(pairs).mean()) if pairs else 0.0


def by_prompt(groups: Sequence[Group], values: Mapping[str, float]) -> np.ndarray:
    """The mean of each group's videos: (groups,)."""
    return np.array([np.mean([values[video] for video in group.videos]) for group in groups])


def finite(groups: Sequence[Group], *tables: Mapping[str, float]) -> list[Group]:
    """The groups of which every video has a finite value in each of the tables: what means and intervals are over."""
    return [group for group in groups if np.isfinite([table[v] for table in tables for v in group.videos]).all()]


def spread(groups: Sequence[Group], values: Mapping[str, float]) -> float:
    """Pooled standard deviation within prompts; NaN where no prompt has two videos with finite values."""
    several = [group for group in finite(groups, values) if len(group.videos) > 1]
    deviations = [np.var([values[v] for v in group.videos], ddof=1) for group in several]
    return float(np.sqrt(np.mean(deviations))) if deviations else float("nan")


def _gain(name: str, difference: np.ndarray, groups: Sequence[Group], seed: int) -> dict[str, Any]:
    """The mean of differences by prompt, its interval over prompts, and their number; None without prompts."""
    return {
        name: float(difference.mean()) if len(groups) else None,
        f"{name}_ci95": prompt_interval(difference, [group.prompt for group in groups], seed=seed),
        "prompts": len(groups),
    }


def gains(
    groups: Sequence[Group], before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]],
    seed: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row per measure: its mean before and after, the paired gain with its interval over prompts, the gain in
    within-prompt standard deviations of the videos before, and the spread within prompts after; over the prompts whose
    videos all have finite values, as in `best_of` and `against`."""
    rows = []
    for name in after:
        kept = finite(groups, before[name], after[name])
        first, second = by_prompt(kept, before[name]), by_prompt(kept, after[name])
        gained = _gain("gain", second - first, kept, seed)
        unit = spread(groups, before[name])
        rows.append(
            {
                "measure": name,
                "before": float(first.mean()) if kept else None,
                "mean": float(second.mean()) if kept else None,
                **gained,
                "gain_sd": gained["gain"] / unit if kept and unit and np.isfinite(unit) else None,
                "spread": _finite(spread(groups, after[name])),
            }
        )
    return rows


def best_of(
    groups: Sequence[Group], table: Mapping[str, Mapping[str, float]], measure: str, n: int, seed: int
) -> dict[str, Any]:
    """Best-of-n with these videos: the measure of the judge's pick, averaged over all sets of n of each prompt's."""
    picks, means = [], []
    kept = finite(groups, table[JUDGE], table[measure])
    for group in kept:
        scores = [table[JUDGE][video] for video in group.videos]
        values = [table[measure][video] for video in group.videos]
        sets = combinations(range(len(scores)), n)
        picks.append(np.mean([values[max(each, key=scores.__getitem__)] for each in sets]))
        means.append(np.mean(values))
    gained = _gain("gain", np.array(picks) - np.array(means), kept, seed)
    return {"n": n, "measure": measure, "mean": float(np.mean(picks)) if kept else None, **gained}


def against(
    groups: Sequence[Group], ours: Mapping[str, float], other: Mapping[str, float], seed: int
) -> dict[str, Any]:
    """The paired difference of a measure between two models, and its interval over prompts."""
    kept = finite(groups, ours, other)
    return _gain("difference", by_prompt(kept, ours) - by_prompt(kept, other), kept, seed)


def gap(
    groups: Sequence[Group], before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]]
) -> np.ndarray:
    """By how much the judge that selects gains more than the outer one, per prompt (groups,), each in within-prompt
    standard deviations of the videos before; where prompts have one video, in those of prompts."""
    gained = []
    for name in (JUDGE, OUTER):
        first, unit = by_prompt(groups, before[name]), spread(groups, before[name])
        unit = unit if np.isfinite(unit) else float(first.std())
        gained.append((by_prompt(groups, after[name]) - first) / (unit or 1.0))
    result: np.ndarray = gained[0] - gained[1]
    return result


def stop_sentence(
    number: int, groups: Sequence[Group], tables: Sequence[Mapping[str, Mapping[str, float]]], seed: int
) -> str | None:
    """The reason to stop after round `number`, or None to go on.

    It stops where the outer judge falls below its best so far (of the untuned model and the rounds before) beyond its
    interval, or where the gap between the judge that selects and the outer one widens beyond its interval against the
    smallest of the rounds before. Against these, and not against the round before, so that no slow drift passes. The
    first round sets the gap: the judge always gains more by what was tuned on its picks.

    tables: of the untuned model, then of each round. Prompts with a video that has no finite score are left out.
    """
    if OUTER not in tables[-1]:
        return None
    groups = finite(groups, *(table[name] for table in tables for name in (JUDGE, OUTER)))
    names = [group.prompt for group in groups]
    if not groups:
        return None
    outer = [by_prompt(groups, table[OUTER]) for table in tables]
    best = max(range(len(tables) - 1), key=lambda each: float(outer[each].mean()))
    fallen = outer[-1] - outer[best]
    interval = prompt_interval(fallen, names, seed=seed)
    if interval is not None and interval[1] < 0:
        above = f"round {best}" if best else "the untuned model"
        return (
            f"Stopped after round {number}: the outer judge fell by {-fallen.mean():.3g} against {above} (95 % "
            f"interval {interval[0]:+.3g} to {interval[1]:+.3g}), so what the judge prefers is no longer better."
        )
    if number < 2:
        return None
    *gaps, last = [gap(groups, tables[0], table) for table in tables[1:]]
    least = min(range(len(gaps)), key=lambda each: float(gaps[each].mean()))
    wider = last - gaps[least]
    interval = prompt_interval(wider, names, seed=seed)
    if interval is not None and interval[0] > 0:
        return (
            f"Stopped after round {number}: the judge's gain ran ahead of the outer judge's by {wider.mean():.2f} "
            f"standard deviations more than in round {least + 1} (95 % interval {interval[0]:+.2f} to "
            f"{interval[1]:+.2f}), as where a judge is played."
        )
    return None


def tuning_cost(
    backbone: Backbone, judge: Judge, call: Mapping[str, Any], config: ImproveConfig, prompts: int, rounds: int,
    levels: Sequence[float],
) -> dict[str, float]:  # fmt: skip
    """Denoiser rows of a sample and of some rounds with as many prompts each, in closed form; a backward pass counts as
    two rows. samples_worth: all of them in plain samples."""
    per_sample = float(sum(backbone.steps({**call, "prompt": ""}).calls))
    sampled = rounds * prompts * config.candidates
    judging = sampled * len(levels) * config.num_draws * judge.tap / backbone.num_blocks
    videos = {"pairs": 2, "winners": 1}.get(config.recipe, config.candidates)
    passes = 5 if config.recipe == "weighted" else 4  # forward, backward, the reference, and the model that sampled
    tuning = float(rounds * config.steps * config.prompts_per_step * videos * passes)
    total = sampled * per_sample + judging + tuning
    rows = {"sampled_rows": sampled * per_sample, "judging_rows": judging, "tuning_rows": tuning, "total_rows": total}
    return {"rows_per_sample": per_sample, **rows, "samples_worth": total / per_sample}


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
