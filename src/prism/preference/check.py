"""Inspection of a preference set before anything is computed from it: counts, conflicts, leaks, agreement."""

from __future__ import annotations

import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prism.clips import probe
from prism.errors import PrismError
from prism.preference.pairs import SPLITS, prompt_key
from prism.preference.readers import pairs
from prism.preference.sets import PreferenceSet

RESAMPLES = 2000
_ARCHIVE = re.compile(r"\.(tar|zip|tgz|7z|rar)(\.\w+)*$|\.tar\.", re.IGNORECASE)


def summary(
    preference_set: PreferenceSet, rule: str = "majority", margin: float = 0.0, open_clips: bool = False
) -> dict[str, Any]:
    """Counts, problems and agreement of a preference set, as JSON types.

    Args:
        preference_set: the set.
        rule: how votes of several annotators are joined, as in `readers.pairs`.
        margin: largest difference of ratings or probabilities that is a tie.
        open_clips: open each clip too; otherwise only check that its file exists.
    """
    table = pairs(preference_set, rule, margin)
    names = [name for name in table.column_names[4:] if ":" not in name]
    counts = {}
    for name in names:
        labels = Counter(table[name].to_pylist())
        counts[name] = {"A": labels[1], "B": labels[-1], "tie": labels[0], "missing": labels[None]}
    columns = ("prompt", "video_a", "video_b", "split")
    splits: dict[str, dict[str, set[str]]] = {"prompts": defaultdict(set), "videos": defaultdict(set)}
    for prompt, a, b, split in zip(*(table[name].to_pylist() for name in columns)):
        for kind, key in (("prompts", prompt_key(prompt)), ("videos", a), ("videos", b)):
            splits[kind][key].add(split or "none")
    of_clip: dict[str, set[str]] = defaultdict(set)
    for prompt, a, b in zip(*(table[name].to_pylist() for name in columns[:3])):
        of_clip[a].add(prompt)
        of_clip[b].add(prompt)
    prompts = {prompt_key(prompt): prompt for prompt in reversed(preference_set.videos["prompt"].to_pylist())}
    return {
        "form": preference_set.form,
        "root": str(preference_set.root),
        "pairs": len(table),
        "votes": len(preference_set.votes),
        "ratings": len(preference_set.ratings),
        "videos": len(preference_set.videos),
        "prompts": len(prompts),
        "dimensions": counts,
        "splits": dict(Counter(split or "none" for split in table["split"].to_pylist())),
        "generators": dict(Counter(model or "unknown" for model in preference_set.videos["model"].to_pylist())),
        "duplicates": _repeated(preference_set)[0],
        "conflicts": _repeated(preference_set)[1],
        "shared_prompts": [prompts[key] for key, held in splits["prompts"].items() if len(held) > 1],
        "shared_videos": [key for key, held in splits["videos"].items() if len(held) > 1],
        "several_prompts": [video for video, texts in of_clip.items() if len(texts) > 1],
        "unknown_splits": sorted({split for split in table["split"].to_pylist() if split and split not in SPLITS}),
        "missing": list(preference_set.missing),
        "archives": _archives(preference_set.root) if preference_set.missing else [],
        "unreadable": _unreadable(preference_set) if open_clips else None,
        "dropped": {why: [str(place) for place in places] for why, places in preference_set.dropped.items()},
        "agreement": {name: agreement(preference_set, name) for name in preference_set.dimensions},
    }


def _repeated(preference_set: PreferenceSet) -> tuple[int, int]:
    """The number of votes that repeat a vote of the same annotator, and of pairs with votes for both sides."""
    votes_of: dict[tuple[Any, ...], list[tuple[Any, Any]]] = defaultdict(list)
    names = ("prompt", "video_a", "video_b", "dimension", "annotator", "label", "p_a", "p_b")
    for prompt, a, b, dimension, annotator, label, p_a, p_b in zip(
        *(preference_set.votes[name].to_pylist() for name in names)
    ):
        if label is None:
            label = float(np.sign((p_a or 0) - (p_b or 0)))
        votes_of[prompt, min(a, b), max(a, b), dimension].append((annotator, label if a <= b else -label))
    duplicates = sum(len(votes) - len(set(votes)) for votes in votes_of.values())
    return duplicates, sum({1, -1} <= {label for _, label in votes} for votes in votes_of.values())


def _archives(root: Path) -> list[str]:
    """Names of archives in the root and in its folders, which may hold the missing clips."""
    names = [each for pattern in ("*", "*/*") for each in root.glob(pattern) if _ARCHIVE.search(each.name)]
    return sorted(each.relative_to(root).as_posix() for each in names)


def _unreadable(preference_set: PreferenceSet) -> list[dict[str, str]]:
    """The clips that exist and cannot be opened, each with its error."""
    wrong, missing = [], set(preference_set.missing)
    for video, path, frames in zip(*(preference_set.videos[name].to_pylist() for name in ("video", "path", "frames"))):
        names = frames or [path]
        if any(each in missing for each in names):
            continue
        try:
            probe(preference_set.source(path, frames))
        except PrismError as error:
            wrong.append({"video": video, "path": names[0], "error": str(error)})
    return wrong


# -- agreement of annotators


def agreement(preference_set: PreferenceSet, dimension: str) -> dict[str, Any] | None:
    """Krippendorff's alpha of a dimension, with its 95 % interval by resampled prompts; None for one vote per pair.

    Votes: nominal, values A, B and tie. Ratings, where there are no votes: nominal over the scores.
    """
    table = preference_set.votes if len(preference_set.votes) else preference_set.ratings
    names = (
        "prompt",
        "dimension",
        *(("video_a", "video_b", "label") if len(preference_set.votes) else ("video", "video", "score")),
    )
    units: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for prompt, name, a, b, value in zip(*(table[each].to_pylist() for each in names)):
        if name == dimension and value is not None:
            units[prompt, min(a, b), max(a, b)].append(-value if b < a else value)
    several = {key: votes for key, votes in units.items() if len(votes) > 1}
    if not several:
        return None
    values = sorted({vote for votes in several.values() for vote in votes})
    counts = np.array([[votes.count(value) for value in values] for votes in several.values()], dtype=float)
    clusters = {prompt: number for number, prompt in enumerate(dict.fromkeys(key[0] for key in several))}
    low, high = interval(counts, [clusters[key[0]] for key in several])
    return {"alpha": alpha(counts), "low": low, "high": high, "units": len(several), "prompts": len(clusters)}


def _coincidences(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The observed disagreement per unit, (units,), and the number of its pairable values by kind, (units, values)."""
    number = counts.sum(1)
    counts = np.where((number > 1)[:, None], counts, 0)  # a unit with a single value has no pair of values
    number = counts.sum(1)
    agreeing = (counts * (counts - 1)).sum(1)
    return np.divide(number * (number - 1) - agreeing, np.maximum(number - 1, 1)), counts


def _alpha(disagreement: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Alpha of (..., ) summed disagreements and (..., values) summed values; NaN if all values are the same."""
    total = kinds.sum(-1)
    expected = total**2 - (kinds**2).sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        values: np.ndarray = np.where(expected > 0, 1 - (total - 1) * disagreement / expected, np.nan)
    return values


def alpha(counts: np.ndarray) -> float | None:
    """Krippendorff's nominal alpha; None if all gave the same value.

    Args:
        counts: (units, values) numbers of annotators that gave a unit a value.

    Source: K. Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section C.
    """
    disagreement, kinds = _coincidences(counts)
    value = float(_alpha(disagreement.sum(), kinds.sum(0)))
    return None if np.isnan(value) else value


def interval(counts: np.ndarray, clusters: Sequence[int], seed: int = 0) -> tuple[float | None, float | None]:
    """The 95 % percentile interval of alpha over resamples of clusters, such as prompts; None, None for one cluster.

    Args:
        counts: (units, values) numbers of annotators that gave a unit a value.
        clusters: (units,) numbers from 0.
        seed: of the resamples.
    """
    from scipy import stats

    disagreement, kinds = _coincidences(counts)
    cluster = np.asarray(clusters)
    if cluster.max() < 1:
        return None, None
    sums = [np.bincount(cluster, weights=column) for column in (disagreement, *kinds.T)]

    def statistic(*columns: np.ndarray, axis: int) -> np.ndarray:
        return _alpha(columns[0].sum(axis), np.stack([column.sum(axis) for column in columns[1:]], -1))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a resample in which all values are the same has no alpha; left out below
        drawn = stats.bootstrap(
            sums,
            statistic,
            paired=True,
            n_resamples=RESAMPLES,
            method="percentile",
            batch=50,
            random_state=np.random.default_rng(seed),
        )
    values = drawn.bootstrap_distribution[~np.isnan(drawn.bootstrap_distribution)]
    if not len(values):
        return None, None
    low, high = np.percentile(values, (2.5, 97.5)).tolist()
    return low, high
