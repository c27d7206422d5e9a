"""Pairwise accuracy against brute force, and the bootstrap against the known error of a mean."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism.errors import PrismError
from prism.evaluation.accuracy import NO_TIES, pairwise_accuracy


def share_right(labels, margins, threshold):
    right = 0
    for label, margin in zip(labels, margins):
        called = 0 if abs(margin) <= threshold else (1 if margin > 0 else -1 if margin < 0 else None)
        right += called == label
    return right / len(labels)


def public_evaluator(labels, margins):
    """The public evaluator's procedure: pairs move one at a time, even equal ones, and no ties at all is not tried."""
    pairs = sorted(zip(labels, margins), key=lambda pair: abs(pair[1]))
    best = -1.0
    for moved in range(1, len(pairs) + 1):
        right = sum(label == 0 for label, _ in pairs[:moved]) + sum(label * m > 0 for label, m in pairs[moved:])
        best = max(best, right / len(pairs))
    return best


# Few distinct margins: equal ones, and zeros, in nearly every example.
PAIRS = st.lists(
    st.tuples(st.sampled_from([-1, 0, 1]), st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])),
    min_size=1,
    max_size=30,
)


@settings(max_examples=300, deadline=None)
@given(PAIRS)
def test_equals_brute_force(pairs):
    labels, margins = (list(column) for column in zip(*pairs))
    result = pairwise_accuracy(labels, margins)
    candidates = [NO_TIES, *sorted({abs(m) for m in margins})]
    shares = [share_right(labels, margins, threshold) for threshold in candidates]
    assert result.with_ties == pytest.approx(max(shares))
    assert result.threshold == candidates[shares.index(max(shares))]
    decided = [(y, m) for y, m in pairs if y]
    expected = sum(y * m > 0 for y, m in decided) / len(decided) if decided else np.nan
    assert result.without_ties == pytest.approx(expected, nan_ok=True)
    for threshold in (NO_TIES, 0.0, 0.7, 1.0):
        fixed = pairwise_accuracy(labels, margins, threshold=threshold)
        assert fixed.with_ties == pytest.approx(share_right(labels, margins, threshold))
        assert fixed.threshold == threshold


@settings(max_examples=200, deadline=None)
@given(PAIRS)
def test_videoalign_method_equals_the_public_procedure(pairs):
    labels, margins = (list(column) for column in zip(*pairs))
    assert pairwise_accuracy(labels, margins, method="videoalign").with_ties == pytest.approx(
        public_evaluator(labels, margins)
    )


@settings(max_examples=100, deadline=None)
@given(PAIRS, st.randoms(use_true_random=False))
def test_exact_does_not_depend_on_order(pairs, random):
    shuffled = random.sample(pairs, len(pairs))
    ours, theirs = pairwise_accuracy(*zip(*pairs)), pairwise_accuracy(*zip(*shuffled))
    assert astuple(ours) == pytest.approx(astuple(theirs), nan_ok=True)


def test_the_public_evaluators_two_traps():
    assert pairwise_accuracy([1, 1, -1, -1], [3, 2, -1, -4]).with_ties == 1
    assert pairwise_accuracy([1, 1, -1, -1], [3, 2, -1, -4], method="videoalign").with_ties == 0.75
    one, other = ([0, 1], [1.0, 1.0]), ([1, 0], [1.0, 1.0])
    assert pairwise_accuracy(*one, method="videoalign").with_ties == 1.0
    assert pairwise_accuracy(*other, method="videoalign").with_ties == 0.5
    assert pairwise_accuracy(*one).with_ties == pairwise_accuracy(*other).with_ties == 0.5


def test_no_pairs_is_not_a_number():
    empty = pairwise_accuracy([], [])
    assert np.isnan([empty.with_ties, empty.without_ties]).all()
    assert np.isnan(pairwise_accuracy([0], [0.3]).without_ties)


@pytest.mark.parametrize(
    ("labels", "margins", "sentence"),
    [
        ([2], [0.1], "Labels must be 1"),
        ([np.nan], [0.1], "Labels must be 1"),
        ([1], [np.nan], "margin of pair 0"),
        ([1, 0], [1.0], "one length"),
    ],
)
def test_refuses(labels, margins, sentence):
    with pytest.raises(PrismError, match=sentence):
        pairwise_accuracy(labels, margins)
