"""A reference: scores of a set of clips, saved with a head, with which other scores are compared.

A score by itself has no unit that people know. Compared with a reference it has two: the percentile, the share of the
reference's clips that score lower, and the win probability, how often the clip would be preferred to one of them.

Heads are trained on pairs within a prompt, so that the mean score of a prompt is arbitrary. A clip is therefore
compared with the reference's clips of its own prompt if there are `ENOUGH`, and otherwise with all; its percentile may
then depend on the prompt more than on the clip (`between_prompts`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from prism import files
from prism.errors import PrismError, flag, number, quoted, whole
from prism.judge.checks import noise_levels
from prism.judge.scoring import default_levels, score_latents
from prism.preference.pairs import prompt_key
from prism.preference.store import LatentStore, store_identity

if TYPE_CHECKING:
    from prism.judge.judge import Judge

FILE = "reference.json"
FORMAT, SCHEMA = "prism-reference", 1
MOST = 100_000  # clips of a reference
ENOUGH = 4
"""Number of clips of a prompt from which on a clip of this prompt is compared with these alone."""
PERCENTILES = (2.5, 50.0, 97.5)
"""Of the scores in a card and on the terminal: the interval that holds 95 % of the clips, and its middle."""
_POINTS, _WEIGHTS = np.polynomial.hermite_e.hermegauss(15)


@dataclass(frozen=True)
class Reference:
    """Scores of a set of clips at some noise levels."""

    levels: tuple[float, ...]
    """The noise levels, t from 0 (clean) to 1000 (noise)."""
    dimensions: tuple[str, ...]
    """The head's dimensions."""
    scores: np.ndarray
    """(levels, clips, num_dimensions) float64, means over noise draws."""
    errors: np.ndarray
    """(levels, clips, num_dimensions) their standard errors; NaN for one draw."""
    prompts: tuple[str, ...]
    """Per clip the `prompt_key` of its prompt."""
    facts: Mapping[str, Any]
    """Provenance, as JSON: store, split, clips, prompts, num_draws, seed, command, call, frames, and `between_prompts`,
    by level and dimension the share of the scores' variance that is between prompts (None: one clip per prompt)."""

    def of_prompt(self, prompt: str) -> Reference:
        """The part of this reference with a prompt if that has `ENOUGH` clips, otherwise all of it."""
        key = prompt_key(prompt)
        rows = [row for row, each in enumerate(self.prompts) if each == key]
        if len(rows) < ENOUGH:
            return self
        return replace(self, scores=self.scores[:, rows], errors=self.errors[:, rows], prompts=(key,) * len(rows))

    def at(self, t: float) -> Reference:
        """This reference at the single level t: each clip's score and its error, linear in t between the two nearest
        levels. Beyond the outermost levels they are those of that level.
        """
        order = sorted(range(len(self.levels)), key=lambda index: self.levels[index])
        place = float(np.interp(t, [self.levels[index] for index in order], np.arange(len(order))))
        low, share = order[int(place)], place % 1
        high = order[min(int(place) + 1, len(order) - 1)]
        scores = (1 - share) * self.scores[low] + share * self.scores[high]
        errors = np.hypot((1 - share) * self.errors[low], share * self.errors[high])
        return replace(self, levels=(t,), scores=scores[None], errors=errors[None])

    def draw_errors(self) -> np.ndarray:
        """Standard deviations of one noise draw's score of a clip, by the mean variance over the clips.

        Returns:
            (levels, num_dimensions) float64, 0 where the reference has one draw per clip.
        """
        draws = float(self.facts.get("num_draws") or 1)
        variances = np.nan_to_num(self.errors**2 * draws).mean(1)
        spread: np.ndarray = np.sqrt(variances)
        return spread

    def percentile(self, scores: np.ndarray, t: float) -> np.ndarray:
        """Percentiles of scores: the share of the reference's scores that are lower, and half that of equal ones.

        Args:
            scores: (B, num_dimensions) float64 at the level t.
            t: one of the levels.

        Returns:
            (B, num_dimensions) float64 from 0 to 100.
        """
        ordered = np.sort(self.scores[self.levels.index(t)], axis=0)
        columns = [
            np.searchsorted(ordered[:, d], scores[:, d], "left") + np.searchsorted(ordered[:, d], scores[:, d], "right")
            for d in range(len(self.dimensions))
        ]
        share: np.ndarray = 50.0 * np.stack(columns, -1) / len(ordered)
        return share

    def win_probability(self, judge: Judge, scores: np.ndarray, errors: np.ndarray, t: float) -> np.ndarray:
        """Probabilities that a clip is preferred to a random one of the reference.

        Each is the mean, over the reference's clips, of P(preferred) + P(tie) / 2 under Eq. 3-4 with the judge's
        calibration if it has one (`Judge.probabilities`). It is also the mean over the noise of both scores: the margin
        is taken as normal around its estimate, with the variance of both means over draws. A NaN error counts as 0.

        Args:
            judge: whose scores these are.
            scores: (B, num_dimensions) float64 at the level t.
            errors: (B, num_dimensions) float64, their standard errors.
            t: one of the levels.

        Returns:
            (B, num_dimensions) float64 from 0 to 1.
        """
        level = self.levels.index(t)
        reference, noise = self.scores[level], np.nan_to_num(self.errors[level])
        wins = []
        for score, error in zip(scores, np.nan_to_num(errors)):
            spread = np.sqrt(error**2 + noise**2)  # (clips, num_dimensions)
            margins = (score - reference) + spread * _POINTS[:, None, None]  # Gauss-Hermite quadrature over the noise
            first, tie, _ = judge.probabilities(torch.from_numpy(margins)).unbind(-1)
            by_point = (first + tie / 2).mean(1).numpy()
            wins.append((_WEIGHTS / _WEIGHTS.sum()) @ by_point)
        return np.stack(wins)

    def beside(self, judge: Judge, scores: Tensor, errors: Tensor, levels: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Percentiles and win probabilities of scores.

        Args:
            judge: whose scores these are.
            scores: (B, levels, num_dimensions) float64.
            errors: (B, levels, num_dimensions) float64, their standard errors.
            levels: of the scores.

        Returns:
            percentiles: (B, levels, num_dimensions) float64, NaN at levels that the reference does not have.
            win_probabilities: (B, levels, num_dimensions) float64, NaN likewise.
        """
        percentiles, wins = torch.full_like(scores, torch.nan), torch.full_like(scores, torch.nan)
        for index, t in enumerate(levels):
            if t in self.levels:
                at_level, noise = scores[:, index].numpy(), errors[:, index].numpy()
                percentiles[:, index] = torch.from_numpy(self.percentile(at_level, t))
                wins[:, index] = torch.from_numpy(self.win_probability(judge, at_level, noise, t))
        return percentiles, wins

    def intervals(self) -> dict[str, dict[str, list[float]]]:
        """The percentiles `PERCENTILES` of the scores, linear between clips, by level and dimension."""
        points = np.percentile(self.scores, PERCENTILES, axis=1)  # (percentiles, levels, num_dimensions)
        return {
            f"{t:g}": {name: points[:, index, d].tolist() for d, name in enumerate(self.dimensions)}
            for index, t in enumerate(self.levels)
        }

    def save(self, folder: str | os.PathLike[str], weights_sha256: str) -> Path:
        """Write reference.json into a head's folder, in one piece; it belongs to weights of this SHA-256."""
        scores = [self.scores.tolist(), None if np.isnan(self.errors).any() else self.errors.tolist()]
        document = {
            "format": FORMAT,
            "schema": SCHEMA,
            "weights_sha256": weights_sha256,
            "scores_sha256": _digest([*scores, list(self.prompts)]),
            **{"levels": list(self.levels), "dimensions": list(self.dimensions), "facts": dict(self.facts)},
            "prompts": list(self.prompts),
            **dict(zip(("scores", "errors"), scores)),
        }
        lines = (f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in document.items())
        path = Path(folder) / FILE
        with files.new_file(path) as work:
            work.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: Path, dimensions: Sequence[str], weights_sha256: Any) -> Reference:
        """Read and check a head's reference.json.

        Raises PrismError where it is damaged or altered, or belongs to other weights or dimensions.
        """
        document = files.read_json(path)
        if not isinstance(document, dict) or document.get("format") != FORMAT or document.get("schema") != SCHEMA:
            raise PrismError(f"The file {path} is no reference of schema {SCHEMA}; delete it, and make it anew.")
        if document.get("weights_sha256") != weights_sha256:
            raise PrismError(f"The file {path} is of another head's weights; delete it, and make it anew.")
        if document.get("dimensions") != list(dimensions):
            raise PrismError(
                f"The field 'dimensions' of {path} must be the head's, {', '.join(dimensions)}; found "
                f"{quoted(document.get('dimensions'), 80)}."
            )
        levels, facts = document.get("levels"), document.get("facts")
        if not isinstance(levels, list) or not levels or len(set(map(repr, levels))) < len(levels):
            raise PrismError(f"The field 'levels' of {path} must list noise levels; found {quoted(levels, 80)}.")
        numbers = (number(f"A level of {path}", t, 0, 1000) for t in levels)
        checked = tuple(int(t) if t.is_integer() else t for t in numbers)
        if not isinstance(facts, dict):
            raise PrismError(f"The field 'facts' of {path} must be an object; found {quoted(facts, 80)}.")
        _check_shares(facts.get("between_prompts"), path)
        scores = _numbers(document.get("scores"), f"The field 'scores' of {path}", len(checked), len(dimensions))
        errors = np.full_like(scores, np.nan)
        if document.get("errors") is not None:
            errors = _numbers(document["errors"], f"The field 'errors' of {path}", len(checked), len(dimensions))
            if errors.shape != scores.shape or (errors < 0).any():
                raise PrismError(f"The field 'errors' of {path} must hold a number from 0 for each score.")
        prompts = document.get("prompts")
        if not isinstance(prompts, list) or [type(key) for key in prompts] != [str] * scores.shape[1]:
            raise PrismError(f"The field 'prompts' of {path} must list the key of each clip's prompt.")
        if document.get("scores_sha256") != _digest([document["scores"], document.get("errors"), prompts]):
            raise PrismError(f"The scores in {path} are not those that were written; the file was altered.")
        return cls(checked, tuple(dimensions), scores, errors, tuple(prompts), facts)


def measure(
    judge: Judge,
    store: LatentStore | str | os.PathLike[str],
    split: str = "test",
    levels: Sequence[float] | None = None,
    num_draws: int = 4,
    seed: int = 0,
    most: int = 1000,
    batch_size: int = 64,
    command: str = "",
    progress: bool = True,
) -> Reference:
    """Scores of a store's clips as a reference; ``judge.reference = measure(...)`` takes it, and saving keeps it.

    Args:
        judge: whose scores.
        store: opened store, or its folder.
        split: whose clips, or "all"; labels are not needed.
        levels: noise levels in [0, 1000]; None: `prism.judge.scoring.default_levels`.
        num_draws: noise draws per clip and level.
        seed: of the noise, and of the prompts that are taken.
        most: largest number of clips; if there are more, whole prompts are drawn at random.
        batch_size: rows per denoiser call.
        command: how it was made, for its provenance.
        progress: show a progress bar (on a terminal).

    Raises:
        PrismError: where the split has fewer than two clips, or the head was trained on one of its prompts.
    """
    store, progress = LatentStore.of(store), flag("progress", progress)
    most, seed = whole("most", most, 2, MOST), whole("seed", seed, 0)
    chosen = default_levels(judge) if levels is None else noise_levels(judge.backbone, levels, "levels")
    clips = _chosen(store, split, most, seed)
    trained_on = set(judge.trained_on.get("prompt_keys", ()))
    for prompt in dict.fromkeys(clips.values()):
        if prompt_key(prompt) in trained_on:
            raise PrismError(
                f"The head was trained on the prompt {quoted(prompt, 120)} of {store.folder}; take clips of prompts "
                "that it has not seen."
            )
    alike: dict[int, list[str]] = {}  # videos of one shape, call and image
    for video, kind in zip(clips, store.kinds(clips).tolist()):
        alike.setdefault(kind, []).append(video)
    scored: dict[str, tuple[Tensor, Tensor]] = {}
    with tqdm(total=len(clips), desc="reference", unit="clip", disable=None if progress else True) as bar:
        for videos in alike.values():
            for start in range(0, len(videos), batch_size):
                batch = videos[start : start + batch_size]
                prompts, call = [clips[video] for video in batch], store.call_of(batch[0])
                latents = store.latents(batch)
                result = score_latents(judge, latents, batch, prompts, chosen, num_draws, seed, batch_size, **call)
                scored.update(zip(batch, zip(*result)))
                bar.update(len(batch))
    scores, errors = (_rounded(np.stack([scored[video][part].numpy() for video in clips], 1)) for part in (0, 1))
    prompts = list(clips.values())
    between = {
        f"{t:g}": {name: between_groups(scores[index, :, d], prompts) for d, name in enumerate(judge.dimensions)}
        for index, t in enumerate(chosen)
    }
    key = store.meta.get("key") or {}
    facts = {
        **{"store": store_identity(store), "split": split, "clips": len(clips), "prompts": len(set(prompts))},
        **{"num_draws": num_draws, "seed": seed, "command": command, "call": store.call, "frames": key.get("frames")},
        "between_prompts": between,
    }
    keys = tuple(prompt_key(prompt) for prompt in prompts)
    return Reference(chosen, judge.dimensions, scores, errors, keys, facts)


def _chosen(store: LatentStore, split: str, most: int, seed: int) -> dict[str, str]:
    """Clips of a split with their prompts, in the store's order: all, or of whole prompts drawn at random, up to
    `most`."""
    columns = (store.videos[name].to_pylist() for name in ("video", "prompt", "split"))
    in_split = {video: prompt for video, prompt, each in zip(*columns) if split in (each, "all")}
    counts: dict[str, int] = {}
    for prompt in in_split.values():
        counts[prompt] = counts.get(prompt, 0) + 1
    left, taken = most, set()
    for prompt in sorted(counts, key=lambda text: hashlib.sha256(f"{seed}/{prompt_key(text)}".encode()).digest()):
        if counts[prompt] <= left:
            taken.add(prompt)
            left -= counts[prompt]
    clips = {video: prompt for video, prompt in in_split.items() if prompt in taken}
    if len(clips) < 2:
        raise PrismError(
            f"The store {store.folder} has {len(in_split)} clips in the split {quoted(split, 40)}, and at most {most}, "
            "of whole prompts, are taken; a reference needs two or more."
        )
    return clips


def between_groups(values: np.ndarray, groups: Sequence[str]) -> float | None:
    """The share of variance between groups: the intraclass correlation of one-way analysis of variance, at
    least 0; None where no group has two members, there is one group, or all values are equal.

    Args:
        values: (clips,) float64.
        groups: per clip, its group's name.
    """
    names, index, counts = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    total, number_of = len(values), len(names)
    if number_of < 2 or number_of == total or np.ptp(values) == 0:
        return None
    means = np.bincount(index, values) / counts
    between = float((counts * (means - values.mean()) ** 2).sum()) / (number_of - 1)
    within = float(((values - means[index]) ** 2).sum()) / (total - number_of)
    size = (total - (counts**2).sum() / total) / (number_of - 1)
    return float(max(0.0, (between - within) / (between + (size - 1) * within)))


def _rounded(values: np.ndarray) -> np.ndarray:
    """The values rounded to six digits, as they are saved."""
    return np.asarray([float(f"{value:.6g}") for value in values.flat]).reshape(values.shape)


def _check_shares(between: Any, path: Path) -> None:
    """Refuse `between_prompts` that is not level -> dimension -> share or None."""
    by_level = between.values() if isinstance(between, dict) else [] if between is None else [between]
    for by_name in by_level:
        if not isinstance(by_name, dict):
            raise PrismError(f"The field 'facts.between_prompts' of {path} must be an object of objects.")
        for share in by_name.values():
            if share is not None:
                number(f"A share in the field 'facts.between_prompts' of {path}", share, 0, 1)


def _digest(scores: Any) -> str:
    return hashlib.sha256(json.dumps(scores).encode()).hexdigest()


def _numbers(values: Any, where: str, levels: int, dimensions: int) -> np.ndarray:
    """(levels, clips, num_dimensions) float64, all finite."""
    try:
        array = np.asarray(values)
        plain = array.ndim == 3 and array.dtype.kind in "if"
    except ValueError:  # ragged
        plain = False
    if not plain or array.shape[::2] != (levels, dimensions) or not 2 <= array.shape[1] <= MOST:
        raise PrismError(
            f"{where} must be {levels} lists of two or more clips with {dimensions} numbers each; found "
            f"{quoted(values, 80)}."
        )
    if not all(math.isfinite(value) for value in array.flat):
        raise PrismError(f"{where} must hold finite numbers; found NaN or infinity.")
    return array.astype(np.float64)
