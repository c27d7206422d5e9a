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
from prism.preference.pairs import prompt_key
from prism.preference.readers import pairs
from prism.preference.sets import PreferenceSet

RESAMPLES = 2000
_ARCHIVE = re.compile(r"\.(tar|zip|tgz|7z|rar)(\.\w+)*$|\.tar\.", re.IGNORECASE)


def summary(
    found: PreferenceSet, rule: str = "majority", margin: float = 0.0, open_clips: bool = False
) -> dict[str, Any]:
    """Everything that is known of a set, as JSON types.

    Args:
        found: a preference set.
        rule: how annotators are joined, as `readers.pairs` takes it.
        margin: largest difference of ratings or probabilities that is a tie.
        open_clips: whether each clip is opened, and not only looked for.
    """
    table = pairs(found, rule, margin)
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
    prompts = {prompt_key(prompt): prompt for prompt in reversed(found.videos["prompt"].to_pylist())}
    return {
        "form": found.form,
        "root": str(found.root),
        "pairs": len(table),
        "votes": len(found.votes),
        "ratings": len(found.ratings),
        "videos": len(found.videos),
        "prompts": len(prompts),
        "dimensions": counts,
        "splits": dict(Counter(split or "none" for split in table["split"].to_pylist())),
        "generators": dict(Counter(model or "unknown" for model in found.videos["model"].to_pylist())),
        "duplicates": _repeated(found)[0],
        "conflicts": _repeated(found)[1],
        "shared_prompts": [prompts[key] for key, held in splits["prompts"].items() if len(held) > 1],
        "shared_videos": [key for key, held in splits["videos"].items() if len(held) > 1],
        "missing": list(found.missing),
        "archives": _archives(found.root) if found.missing else [],
        "unreadable": _unreadable(found) if open_clips else None,
        "dropped": {why: [str(place) for place in places] for why, places in found.dropped.items()},
        "agreement": {name: agreement(found, name) for name in found.dimensions},
    }


def _repeated(found: PreferenceSet) -> tuple[int, int]:
    """Votes that repeat one of the same annotator (or of none that is named), and pairs with votes for either side."""
    said: dict[tuple[Any, ...], list[tuple[Any, Any]]] = defaultdict(list)
    names = ("prompt", "video_a", "video_b", "dimension", "annotator", "label", "p_a", "p_b")
    for prompt, a, b, dimension, annotator, label, p_a, p_b in zip(*(found.votes[name].to_pylist() for name in names)):
        if label is None:
            label = float(np.sign((p_a or 0) - (p_b or 0)))
        said[prompt, min(a, b), max(a, b), dimension].append((annotator, label if a <= b else -label))
    duplicates = sum(len(votes) - len(set(votes)) for votes in said.values())
    return duplicates, sum({1, -1} <= {label for _, label in votes} for votes in said.values())


def _archives(root: Path) -> list[str]:
    """Names of archives in the root and the folders in it, in which missing clips may be."""
    names = [each for pattern in ("*", "*/*") for each in root.glob(pattern) if _ARCHIVE.search(each.name)]
    return sorted(each.relative_to(root).as_posix() for each in names)


def _unreadable(found: PreferenceSet) -> list[dict[str, str]]:
    """The clips that are there and cannot be opened, and why."""
    wrong, missing = [], set(found.missing)
    for video, path, frames in zip(*(found.videos[name].to_pylist() for name in ("video", "path", "frames"))):
        names = frames or [path]
        if any(each in missing for each in names):
            continue
        try:
            whole = [str(found.root / each) for each in names]
            probe(whole if frames else whole[0])
        except PrismError as error:
            wrong.append({"video": video, "path": names[0], "error": str(error)})
    return wrong


# -- agreement of annotators


def agreement(found: PreferenceSet, dimension: str) -> dict[str, Any] | None:
    """Krippendorff's alpha of a dimension, with its 95 % interval by resampled prompts; None for one vote a pair.

    Votes: nominal, values A, B and tie. Ratings, where there are no votes: nominal over the scores.
    """
    table = found.votes if len(found.votes) else found.ratings
    names = (
        "prompt",
        "dimension",
        *(("video_a", "video_b", "label") if len(found.votes) else ("video", "video", "score")),
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
    """Per unit the observed disagreement, (units,), and its pairable values by kind, (units, values)."""
    number = counts.sum(1)
    counts = np.where((number > 1)[:, None], counts, 0)  # a value that stands alone is paired with nothing
    number = counts.sum(1)
    agreeing = (counts * (counts - 1)).sum(1)
    return np.divide(number * (number - 1) - agreeing, np.maximum(number - 1, 1)), counts


def _alpha(disagreement: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Alpha of (..., ) summed disagreements and (..., values) summed values; NaN where all values are one."""
    total = kinds.sum(-1)
    expected = total**2 - (kinds**2).sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        found: np.ndarray = np.where(expected > 0, 1 - (total - 1) * disagreement / expected, np.nan)
    return found


def alpha(counts: np.ndarray) -> float | None:
    """Krippendorff's nominal alpha; None where all gave one value.

    Args:
        counts: (units, values) numbers of annotators that gave a unit a value.

    Source: K. Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section C.
    """
    disagreement, kinds = _coincidences(counts)
    found = float(_alpha(disagreement.sum(), kinds.sum(0)))
    return None if np.isnan(found) else found


def interval(counts: np.ndarray, clusters: Sequence[int], seed: int = 0) -> tuple[float | None, float | None]:
    """The 95 % percentile interval of alpha over resamples of clusters, such as prompts; None, None for one cluster.

    Args:
        counts: (units, values) numbers of annotators that gave a unit a value.
        clusters: (units,) numbers from 0.
        seed: of the resamples.
    """
    from scipy import stats

    disagreement, kinds = _coincidences(counts)
    place = np.asarray(clusters)
    if place.max() < 1:
        return None, None
    sums = [np.bincount(place, weights=column) for column in (disagreement, *kinds.T)]

    def statistic(*columns: np.ndarray, axis: int) -> np.ndarray:
        return _alpha(columns[0].sum(axis), np.stack([column.sum(axis) for column in columns[1:]], -1))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a resample in which all values are one has no alpha, and is left out below
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
