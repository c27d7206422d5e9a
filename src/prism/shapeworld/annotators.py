"""Simulated annotators of known noise, to study what ties, disagreement and wrong labels do to a judge.

An annotator sees each score of a pair with a normally distributed error, drawn anew for each pair, calls a small
difference a tie, and sometimes votes at random. The votes of several annotators are joined by majority, and the overall
label follows from the dimensions by the paper's rule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from scipy.special import ndtr

from prism.errors import PrismError
from prism.preference.pairs import PAIR_COLUMNS, label_matrix, overall
from prism.shapeworld import referee

NAMES = tuple(referee.TIE_MARGINS)  # VQ, MQ, TA


def _each(value: float) -> Mapping[str, float]:
    return dict.fromkeys(NAMES, value)


@dataclass(frozen=True)
class Annotator:
    """The errors of one annotator, per dimension (VQ, MQ, TA).

    Attributes:
        noise: standard deviation of the error of a score, in the score's unit [0, 1]; at least 0.
        margin: largest difference of the two scores, errors included, that is called a tie; at least 0.
        bias: added to score A minus score B; a positive bias prefers the video that is shown first.
        lapse: share of random votes, in which A, B and tie are equally likely; in [0, 1].
    """

    noise: Mapping[str, float] = field(default_factory=lambda: _each(0.05))
    margin: Mapping[str, float] = field(default_factory=lambda: dict(referee.TIE_MARGINS))
    bias: Mapping[str, float] = field(default_factory=lambda: _each(0.0))
    lapse: float = 0.0

    def __post_init__(self) -> None:
        for name in ("noise", "margin", "bias"):
            values = getattr(self, name)
            if set(values) != set(NAMES):
                raise PrismError(
                    f"An annotator's {name} needs a number for each of {', '.join(NAMES)}, found {', '.join(values)}."
                )
            if name != "bias" and not all(value >= 0 for value in values.values()):
                raise PrismError(f"An annotator's {name} must be 0 or more, found {min(values.values())}.")
        if not 0 <= self.lapse <= 1:
            raise PrismError(f"An annotator's lapse is a share from 0 to 1, found {self.lapse}.")

    def probabilities(self, difference: np.ndarray, dimension: str) -> np.ndarray:
        """Probabilities (..., 3) of the votes -1, 0 and 1, for differences (...) of true scores, A minus B."""
        spread = math.sqrt(2) * self.noise[dimension]
        edges = np.array([-self.margin[dimension], self.margin[dimension]])
        above = edges - np.asarray(difference)[..., None] - self.bias[dimension]
        if spread > 0:
            below = ndtr(above / spread)
        else:  # a difference equal to the margin is a tie
            below = np.stack([above[..., 0] > 0, above[..., 1] >= 0], -1).astype(float)
        chances = np.stack([below[..., 0], below[..., 1] - below[..., 0], 1 - below[..., 1]], -1)
        return (1 - self.lapse) * chances + self.lapse / 3


def team(count: int, noise: float, lapse: float = 0.0, bias: float = 0.0) -> tuple[Annotator, ...]:
    """`count` annotators with the same settings and the referee's tie margins."""
    return tuple(Annotator(noise=_each(noise), bias=_each(bias), lapse=lapse) for _ in range(count))


def vote(videos: pa.Table, pairs: pa.Table, annotators: Sequence[Annotator], seed: int) -> np.ndarray:
    """Votes of annotators on pairs, (annotators, pairs, 3) of 1 (A), -1 (B) or 0 (tie) for VQ, MQ and TA.

    Args:
        videos: columns video, VQ, MQ and TA: the true scores.
        pairs: columns video_a and video_b.
        annotators: each draws from a random stream of its own, so that adding one does not change the others' votes.
        seed: fixes all errors and random votes.

    Raises:
        PrismError: where a pair's video has no scores."""
    scores = _scores(videos, pairs)
    votes = np.zeros((len(annotators), len(pairs), len(NAMES)), dtype=np.int8)
    for number, annotator in enumerate(annotators):
        chance = np.random.default_rng((seed, number))
        error = chance.standard_normal((2, *scores.shape[1:]))
        noise, margin, bias = (
            np.array([values[name] for name in NAMES]) for values in (annotator.noise, annotator.margin, annotator.bias)
        )
        noisy = scores + noise * error
        difference = noisy[0] - noisy[1] + bias
        drawn = np.where(np.abs(difference) <= margin, 0, np.sign(difference))
        lapsed = chance.random(drawn.shape) < annotator.lapse
        votes[number] = np.where(lapsed, chance.integers(-1, 2, drawn.shape), drawn)
    return votes


def majority(votes: np.ndarray) -> np.ndarray:
    """The majority (...) of votes (annotators, ...): the vote of more than half of the annotators, or else a tie."""
    half = len(votes) / 2
    return ((votes == 1).sum(0) > half).astype(np.int8) - ((votes == -1).sum(0) > half).astype(np.int8)


def label(videos: pa.Table, pairs: pa.Table, annotators: Sequence[Annotator], seed: int) -> pa.Table:
    """Label pairs by the majority of annotators in place of the referee; return a table of pairs like a store's.

    The overall label follows from the three by the paper's rule, `prism.preference.pairs.overall`.

    Raises:
        PrismError: without annotators, or where a pair's video has no scores."""
    if not annotators:
        raise PrismError("There are no annotators to label the pairs; give at least one.")
    joined = majority(vote(videos, pairs, annotators, seed)).astype(np.float64)
    columns = {name: pairs[name] for name in PAIR_COLUMNS}
    for number, name in enumerate(NAMES):
        columns[name] = pa.array(joined[:, number].astype(np.int8), pa.int8())
    whole = overall(joined)
    missing = np.isnan(whole)
    columns["overall"] = pa.array(np.where(missing, 0, whole).astype(np.int8), pa.int8(), mask=missing)
    return pa.table(columns)


def agreement(votes: np.ndarray, pairs: pa.Table) -> dict[str, dict[str, float]]:
    """Agreement of annotators, per dimension, for votes (annotators, P, 3) on P `pairs` that the referee labelled.

    `between`: share of pairs on which two annotators vote alike, the mean over all couples of annotators (NaN for a
    single annotator); `referee`: share of votes equal to the referee's label; `flipped`: share of votes for the worse
    video, among pairs in which the referee prefers one; `ties`: share of votes that are ties."""
    truth, count = label_matrix(pairs, NAMES), len(votes)
    rows = {}
    for number, name in enumerate(NAMES):
        cast, labels = votes[:, :, number], truth[:, number]
        decided = np.abs(labels) == 1
        alike = [np.mean(cast[i] == cast[j]) for i in range(count) for j in range(i)]
        rows[name] = {
            "between": float(np.mean(alike)) if alike else math.nan,
            "referee": float(np.mean(cast[:, ~np.isnan(labels)] == labels[~np.isnan(labels)])),
            "flipped": float(np.mean(cast[:, decided] == -labels[decided])) if decided.any() else math.nan,
            "ties": float(np.mean(cast == 0)),
        }
    return rows


def _scores(videos: pa.Table, pairs: pa.Table) -> np.ndarray:
    """True scores of A and B, (2, pairs, 3)."""
    matrix = np.stack([videos[name].to_numpy().astype(np.float64) for name in NAMES], 1)
    row_of = {video: row for row, video in enumerate(videos["video"].to_pylist())}
    sides = []
    for column in ("video_a", "video_b"):
        ids = pairs[column].to_pylist()
        for video in ids:
            if video not in row_of:
                raise PrismError(f"The pairs name a video {video!r} that has no scores; label pairs of the same store.")
        sides.append(matrix[[row_of[video] for video in ids]])
    return np.stack(sides)
