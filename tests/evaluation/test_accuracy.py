"""Pairwise accuracy against brute force, and the bootstrap against the known error of a mean."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism.errors import PrismError
from prism.evaluation.accuracy import FEWEST_PROMPTS, NO_TIES, clustered_bootstrap, pairwise_accuracy, prompt_interval


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


def test_bootstrap_of_one_row_clusters_has_the_width_of_a_mean():
    values = np.random.default_rng(0).normal(3, 2, 2000)
    low, high = clustered_bootstrap(values, np.arange(2000))
    error = values.std() / np.sqrt(2000)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.25 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.25 * error)


def test_bootstrap_counts_prompts_not_pairs():
    by_prompt = np.random.default_rng(1).normal(0, 1, 100)
    values, clusters = np.repeat(by_prompt, 28), np.repeat(np.arange(100), 28)
    low, high = clustered_bootstrap(values, clusters)
    assert high - low == pytest.approx(2 * 1.96 * by_prompt.std() / 10, rel=0.15)
    assert (low, high) == pytest.approx(clustered_bootstrap(by_prompt, [f"prompt {i:03d}" for i in range(100)]))


def test_bootstrap_equals_a_plain_loop_with_ragged_clusters_and_a_ratio():
    rng = np.random.default_rng(2)
    clusters = rng.integers(0, 12, 90)
    values = np.stack([rng.normal(1, 1, 90), rng.normal(5, 1, 90)], 1)
    low, high = clustered_bootstrap(values, clusters, statistic=lambda s: s[:, 0] / s[:, 1], seed=7, draws=300)
    groups = [values[clusters == c] for c in np.unique(clusters)]
    times = np.random.default_rng(7).multinomial(len(groups), np.full(len(groups), 1 / len(groups)), size=300)
    ratios = []
    for draw in times:
        rows = np.concatenate([group for group, count in zip(groups, draw) for _ in range(count)])
        ratios.append(rows[:, 0].mean() / rows[:, 1].mean())
    assert (low, high) == pytest.approx(tuple(np.percentile(ratios, [2.5, 97.5])))


def test_bootstrap_of_nothing_is_not_a_number():
    assert np.isnan(clustered_bootstrap([], [])).all()
    assert np.isnan(clustered_bootstrap([[0.0, 0.0]], ["a"], statistic=lambda s: s[:, 0] / s[:, 1])).all()
    with pytest.raises(PrismError, match="one length"):
        clustered_bootstrap([1.0], [])


def test_few_prompts_have_no_interval():
    """Of one prompt the percentiles would be a point, as if it were known exactly."""
    enough = np.repeat(np.arange(FEWEST_PROMPTS), 3)
    values = np.arange(len(enough)) % 2
    assert prompt_interval(values, enough) == list(clustered_bootstrap(values, enough))
    few = enough < FEWEST_PROMPTS - 1
    assert prompt_interval(values[few], enough[few]) is None
    assert prompt_interval(np.ones(50), ["a"] * 50) is None
    assert prompt_interval([], []) is None
