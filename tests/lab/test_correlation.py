"""Coefficients, p and intervals of a correlation against scipy, against all orders, and in a simulation."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from scipy import stats

import correlation_coverage
from prism.errors import PrismError
from prism.lab import coefficients, correlation, correlation_shown
from prism.lab.correlation import PerPrompt, Point, Published, correlate
from prism.report.figures import as_svg, new_figure

HAND = np.array([1.0, 2.0, 4.0, 3.0, 7.0, 5.0]), np.array([0.2, 0.1, 0.9, 0.4, 0.8, 0.8])


def published(quality, power, **further):
    return [
        Point(f"b{i}", Published(x, 0.01), Published(y, 0.01), **{name: values[i] for name, values in further.items()})
        for i, (x, y) in enumerate(zip(quality, power, strict=True))
    ]


@pytest.mark.parametrize("name", coefficients.BY_NAME)
def test_coefficients_are_scipys_also_with_ties_and_of_many_draws_at_once(name):
    oracle = {"pearson": stats.pearsonr, "spearman": stats.spearmanr, "kendall": stats.kendalltau}[name]
    assert float(coefficients.BY_NAME[name](*HAND)) == pytest.approx(oracle(*HAND)[0])
    draws = np.random.default_rng(0).normal(size=(2, 5, 6))
    expected = [oracle(x, y)[0] for x, y in zip(*draws)]
    np.testing.assert_allclose(coefficients.BY_NAME[name](*draws), expected)
    assert math.isnan(float(coefficients.BY_NAME[name](HAND[0], np.full(6, 0.3))))


@pytest.mark.parametrize("name", coefficients.BY_NAME)
@pytest.mark.parametrize("size", [3, 4, 6])
def test_p_counts_every_order_once(name, size):
    """The oracle lists all orders; equal values and sums that tie the observed one are among them."""
    x, y = HAND[0][:size], HAND[1][:size]
    of = coefficients.BY_NAME[name]
    values = np.array([float(of(x, np.array(order))) for order in permutations(y)])
    observed = float(of(x, y))
    expected = min(1.0, 2 * min((values >= observed - 1e-9).mean(), (values <= observed + 1e-9).mean()))
    assert coefficients.permutation_p(name, x, y) == (pytest.approx(expected), "exact")


def test_p_counted_in_halves_agrees_with_random_orders():
    chance = np.random.default_rng(3)
    x = chance.normal(size=11)
    y = x + 1.5 * chance.normal(size=11)
    for name in ("pearson", "spearman"):
        counted, method = coefficients.permutation_p(name, x, y)
        dealt, random = coefficients.permutation_p(name, x, y, most_exact=10)
        assert (method, random) == ("exact", "99,999 random orders")
        assert dealt == pytest.approx(counted, abs=4 * math.sqrt(counted / 1e5))


def test_partial_coefficients_are_those_of_residuals():
    chance = np.random.default_rng(0)
    held, rest = chance.normal(size=(9, 2)), chance.normal(size=(9, 2))
    x, y = held @ [1, 2] + rest[:, 0], held @ [2, -1] + rest @ [0.7, 0.7]
    r = np.corrcoef(np.column_stack([x, y, held]), rowvar=False)
    inverse = np.linalg.inv(r)  # the textbook's way, by the inverse of the matrix of correlations
    expected = -inverse[0, 1] / math.sqrt(inverse[0, 0] * inverse[1, 1])
    assert float(coefficients.partial("pearson", x, y, held)) == pytest.approx(expected)
    ranks = [stats.rankdata(each) for each in (x, y)]
    one = held[:, :1]
    a, b, c = (np.corrcoef(*pair)[0, 1] for pair in (ranks, *((each, stats.rankdata(one)) for each in ranks)))
    expected = (a - b * c) / math.sqrt((1 - b**2) * (1 - c**2))
    assert float(coefficients.partial("spearman", x, y, one)) == pytest.approx(expected)
    assert math.isnan(float(coefficients.partial("pearson", held[:, 0] * 2, y, held)))  # nothing is left of it


def test_the_interval_for_other_backbones_is_scipys():
    ends = coefficients.others_interval("pearson", stats.pearsonr(*HAND)[0], 6)
    assert ends == pytest.approx(list(stats.pearsonr(*HAND).confidence_interval()))
    assert coefficients.others_interval("kendall", 0.5, 4) is None


def test_both_axes_and_the_seeds_widen_the_interval():
    prompts = tuple(f"p{i}" for i in range(60))
    chance = np.random.default_rng(0)

    def points(noise, spread):
        return [
            Point(
                f"b{k}",
                PerPrompt(k / 10 + noise * np.random.default_rng(k).normal(size=(1, 60)), np.ones(60), prompts),
                PerPrompt(np.full((3, 60), k / 10) + spread * np.array([[-1], [0], [1]]), np.ones(60), prompts),
            )
            for k in chance.permutation(7)
        ]

    exact, noisy, seeds = (correlate(points(*each), draws=400) for each in ((0, 0), (0.5, 0), (0, 0.1)))
    assert exact.row("pearson")["value_ci95"] == pytest.approx([1, 1])
    assert noisy.row("pearson")["value_ci95"][0] < 0.98
    assert seeds.row("pearson")["value_ci95"][0] < 0.98
    # three equally spaced seeds: the standard error of their mean is spread / sqrt(3)
    row = seeds.points[0]
    assert row["power_ci95"][1] - row["power"] == pytest.approx(1.96 * 0.1 / math.sqrt(3), rel=0.1)


def test_prompts_of_both_axes_are_resampled_together():
    """Quality and power that rise and fall with the same prompts do so in each resample too."""
    prompts = tuple(f"p{i}" for i in range(50))
    values = np.random.default_rng(0).normal(size=(1, 50))
    point = Point("b", PerPrompt(values, np.ones(50), prompts), PerPrompt(2 * values, np.ones(50), prompts))
    quality, power = correlation.resampled([point], draws=200)
    np.testing.assert_allclose(power, 2 * quality)
    assert quality.std() == pytest.approx(values.std() / math.sqrt(50), rel=0.2)


def test_fewer_than_five_backbones_conclude_an_order_alone():
    found = correlate(published([0.2, 0.5, 0.8, 0.9], [0.5, 0.6, 0.7, 0.8]), draws=100)
    assert all(row["p"] >= 1 / 12 - 1e-9 for row in found.rows if not row["given"])
    word, sentence = correlation_shown.verdict(found)
    assert word == "cannot be told"
    assert sentence.startswith(
        "Of 4 backbones the order alone can be told: by quality b0 < b1 < b2 < b3, and they judge"
    )
    assert "p of 0.083, above .05" in sentence
    assert "cannot correlate" in correlation_shown.verdict(correlate([]))[1]


def test_verdict_paragraph_and_figures_say_what_the_numbers_are():
    quality = np.linspace(0.3, 0.9, 10)
    power = 0.5 + 0.4 * quality + np.array([0.01, -0.01] * 5)
    runs = ["a"] * 4 + ["b"] * 3 + [None] * 3
    compute = [1.0, 4.0, 2.0, 3.0, 9.0, 8.0, 5.0, 6.0, 7.0, 10.0]
    size = [1.0, 3.0, 2.0, 5.0, 4.0, 2.0, 7.0, 1.0, 3.0, 9.0]
    found = correlate(published(quality, power, run=runs, parameters=size, compute=compute), draws=300)
    assert {row["given"] for row in found.rows} == {"", "parameters", "compute", "parameters and compute"}
    assert [row["left_out"] for row in found.left_out if row["kind"] == "training"] == ["a", "b"]
    expected = correlate(published(quality[1:], power[1:]), draws=100).row("kendall")["value"]
    assert found.left_out[0]["kendall"] == pytest.approx(expected)
    word, sentence = correlation_shown.verdict(found)
    assert word == "holds"
    assert "all orders counted" in sentence
    text = correlation_shown.paragraph(found, "nobody's videos")
    assert "given parameters and compute" in text
    assert "stages of one training are not" in text
    flat = correlate(published(quality, power[[5, 1, 8, 3, 0, 9, 2, 7, 4, 6]]), draws=300)
    assert correlation_shown.verdict(flat).word == "does not hold"
    figure, axes = new_figure(5, 4)
    correlation_shown.draw(found.points, axes)
    assert "b4" in as_svg(figure, "Quality and power")
    figure, axes = new_figure(5, 4)
    correlation_shown.draw_left_out(found.left_out, 0.9, axes)
    assert "training a" in as_svg(figure, "Left out")


def test_missing_and_repeated_values_are_refused():
    with pytest.raises(PrismError, match="generative quality of the backbone b1 is nan; give a number"):
        correlate(published([0.1, math.nan], [0.1, 0.2]))
    with pytest.raises(PrismError, match="b0 is named 2 times"):
        correlate(published([0.1], [0.1]) * 2)


def test_intervals_cover_the_true_coefficients():
    """A small run of benchmarks/correlation_coverage.py, whose numbers docs/correlation.md gives."""
    covered = correlation_coverage.simulate(backbones=10, trials=40, draws=200)
    assert all(share >= 0.85 for share in covered.values())
