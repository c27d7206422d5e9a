"""Intervals against scipy, plain loops, closed forms, and how often they cover the truth of simulated pairs."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

import coverage_of_intervals as simulated
from prism.errors import PrismError
from prism.evaluation.intervals import (
    FEWEST_PROMPTS,
    FEWEST_VIDEOS,
    MANY_PROMPTS,
    clustered_bootstrap,
    prompt_interval,
    video_interval,
)


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


@pytest.mark.usefixtures("intervals_of_few")
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


def test_it_is_scipys_bootstrap_of_sums_per_prompt():
    """Other draws, so that the ends differ by the error of 20,000 draws."""
    rng = np.random.default_rng(3)
    prompts = rng.integers(0, 50, 400)
    right = rng.random(400) < 0.5 + 0.006 * prompts
    sums = np.bincount(prompts, right), np.bincount(prompts)
    scipys = stats.bootstrap(
        sums,
        lambda r, n, axis: r.sum(axis) / n.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=20000,
        random_state=rng,  # a name that old and new versions take
    ).confidence_interval
    low, high = clustered_bootstrap(right, prompts, draws=20000)
    assert (low, high) == pytest.approx((scipys.low, scipys.high), abs=0.02 * (high - low))


def test_of_few_prompts_the_percentiles_are_widened_as_students_t_is():
    """Means of one normal row per cluster: Student's interval is exact."""
    values = np.random.default_rng(4).normal(0, 1, 12)
    low, high = clustered_bootstrap(values, np.arange(12), draws=200_000)
    student = 2 * stats.t.ppf(0.975, 11) * values.std(ddof=1) / np.sqrt(12)
    assert high - low == pytest.approx(student, rel=0.06)
    many = np.random.default_rng(4).normal(0, 1, MANY_PROMPTS)
    low, high = clustered_bootstrap(many, np.arange(MANY_PROMPTS), draws=100_000)
    assert high - low == pytest.approx(2 * 1.96 * many.std() / np.sqrt(MANY_PROMPTS), rel=0.03)


def test_the_interval_over_videos_by_hand():
    """A ring of pairs: every video is in two of them, and shares one with each neighbour."""
    n = FEWEST_VIDEOS
    values = (np.arange(n) % 3 == 0).astype(float)
    first = [f"v{i}" for i in range(n)]
    second = first[1:] + first[:1]
    e = values - values.mean()
    variance = sum(e[i] * e[j] for i in range(n) for j in range(n) if min((i - j) % n, (j - i) % n) <= 1)
    variance = max(variance, (e**2).sum()) * n / (n - 4) / n**2
    half = stats.t.ppf(0.975, n / 2 - 1) * np.sqrt(variance)
    assert video_interval(values, first, second) == pytest.approx([values.mean() - half, values.mean() + half])
    positive = np.arange(n) < n / 2
    e = positive - positive.mean()
    variance = sum(e[i] * e[j] for i in range(n) for j in range(n) if min((i - j) % n, (j - i) % n) <= 1)
    assert variance > (e**2).sum()
    half = stats.t.ppf(0.975, n / 2 - 1) * np.sqrt(variance * n / (n - 4)) / n
    assert video_interval(positive, second, first) == pytest.approx([0.5 - half, 0.5 + half])


def test_where_there_is_no_interval_over_videos():
    few, apart = [f"v{i}" for i in range(FEWEST_VIDEOS - 1)], [f"w{i}" for i in range(100)]
    assert video_interval([1.0] * len(few), few, few[1:] + few[:1]) is None
    assert video_interval([1.0] * 50, apart[:50], apart[50:]) is None  # no video is in two pairs
    with pytest.raises(PrismError, match="one length"):
        video_interval([1.0], ["a", "b"], ["c"])


@pytest.mark.parametrize("prompts", [12, 60])
def test_intervals_over_prompts_cover_the_truth_in_95_of_100_sets(prompts):
    covered = simulated.over_prompts(prompts, repetitions=400, seed=1)
    assert 0.91 < covered < 0.985  # 93 to 97 % within 2 standard errors of 400 repetitions


def test_intervals_over_videos_cover_the_truth_in_95_of_100_sets():
    covered = simulated.over_videos(100, repetitions=400, seed=1)
    assert 0.91 < covered < 0.985
