"""Intervals and tests against SciPy's and against formulas in other algebra."""

import numpy as np
import pytest
from scipy import stats

from stages.comparing import Scores, compare, exact_p, retention_interval


def right(*shares, measure="accuracy"):
    """Records of which so many in a row are right or wrong: (1, 40), (0, 10)."""
    values = np.concatenate([np.full(count, float(value)) for value, count in shares])
    return Scores(measure, values, np.ones_like(values))


def fell(questions, before, lost, won=0):
    """A model that answers the first `before` questions rightly, and one that loses some of them and wins others."""
    first = right((1, before), (0, questions - before))
    second = right((0, lost), (1, before - lost + won), (0, questions - before - won))
    return first, second


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (3, 0), (12, 0), (5, 9), (9, 5), (40, 61)])
def test_the_exact_test_is_scipys_binomial(lost, won):
    truth = stats.binomtest(lost, lost + won, 0.5).pvalue if lost + won else 1.0
    assert exact_p(lost, won) == pytest.approx(truth)


def test_few_questions_say_nothing_and_many_do():
    unclear, clear = compare(*fell(50, 40, 3)), compare(*fell(50, 40, 12))
    assert not unclear.is_clear and unclear.p == 0.25 and unclear.interval[0] < 0 < unclear.interval[1]
    assert clear.is_clear and clear.p == pytest.approx(2 / 2**12) and clear.interval[1] < 0
    assert unclear.needed > 50 and clear.needed < 50


def test_both_the_interval_and_the_exact_test_have_to_agree():
    found = compare(*fell(1000, 500, 5))
    assert found.p == pytest.approx(0.0625) and not found.is_clear


def test_that_nothing_was_lost_of_five_questions_excludes_little():
    low, high = compare(*fell(5, 5, 0)).interval
    assert low < -0.3 and high > 0.3
    low, high = compare(*fell(1000, 1000, 0)).interval
    assert -0.005 < low < 0 < high < 0.005


@pytest.mark.parametrize(("questions", "before", "lost", "won"), [(100, 65, 6, 3), (400, 200, 60, 30), (60, 60, 4, 0)])
def test_the_interval_is_that_of_bonett_and_price(questions, before, lost, won):
    """Their formula: shares of one more lost and one more won of two more records, ± z standard errors."""
    lost_share, won_share = ((count + 1) / (questions + 2) for count in (lost, won))
    middle = won_share - lost_share
    reach = stats.norm.ppf(0.975) * np.sqrt((lost_share + won_share - middle**2) / (questions + 2))
    assert compare(*fell(questions, before, lost, won)).interval == pytest.approx(
        [middle - reach, middle + reach], abs=0.012
    )


def losses(seed, count=300):
    generator = np.random.default_rng(seed)
    weights = generator.integers(1, 30, count).astype(float)
    first = Scores("loss", weights * generator.gamma(2, 1, count), weights)
    second = Scores("loss", first.values * generator.uniform(0.8, 1.1, count), weights)
    return first, second


def test_intervals_of_a_loss_are_scipys_of_a_ratio_of_sums():
    first, second = losses(0)

    def ratio(values, weights, axis):
        return values.sum(axis) / weights.sum(axis)

    def difference(a, b, weights, axis):
        return ratio(b, weights, axis) - ratio(a, weights, axis)

    drawn = {"paired": True, "method": "percentile", "n_resamples": 4000, "rng": 1}
    truth = stats.bootstrap((first.values, first.weights), ratio, **drawn).confidence_interval
    assert first.interval() == pytest.approx(truth, rel=0.02)
    truth = stats.bootstrap((first.values, second.values, first.weights), difference, **drawn).confidence_interval
    found = compare(first, second)
    assert found.interval == pytest.approx(truth, rel=0.1) and found.p is None and found.is_clear


def test_a_score_that_is_no_right_or_wrong_has_no_exact_test():
    first, second = (Scores("chrf", values, np.ones(100)) for values in (np.full(100, 0.6), np.linspace(0.2, 0.8, 100)))
    found = compare(first, second)
    assert found.p is None and found.is_clear and found.difference == pytest.approx(-0.1)


def test_paired_records_tell_what_unpaired_ones_do_not():
    generator = np.random.default_rng(0)
    hard = generator.uniform(0, 1, 200)
    first, second = (Scores("chrf", np.clip(hard - less, 0, 1), np.ones(200)) for less in (0.0, 0.06))
    apart = Scores("chrf", generator.permutation(second.values), np.ones(200))
    assert compare(first, second).is_clear and not compare(first, apart).is_clear


def test_how_many_questions_it_takes_is_connors_number():
    """Connor 1987 for McNemar's test: (z₁₋α/₂ √ψ + z₁₋β √(ψ − δ²))² / δ², ψ the share of unlike answers."""
    needed = compare(*fell(2000, 1500, 120, 80)).needed
    unlike, difference = 200 / 2000, 40 / 2000
    z = stats.norm.ppf([0.975, 0.8])
    connor = (z[0] * np.sqrt(unlike) + z[1] * np.sqrt(unlike - difference**2)) ** 2 / difference**2
    assert needed == pytest.approx(connor, rel=0.03)


def test_so_many_questions_tell_it_four_times_of_five():
    first, second = fell(100, 80, 8, 2)
    needed, generator = compare(first, second).needed, np.random.default_rng(0)
    told = 0
    for _ in range(100):
        drawn = generator.integers(100, size=needed)
        told += compare(*(Scores("chrf", each.values[drawn], np.ones(needed)) for each in (first, second))).is_clear
    assert 70 <= told <= 95


def test_no_difference_takes_no_number_of_questions():
    assert compare(*fell(100, 50, 5, 5)).needed is None


def test_the_share_that_is_kept_has_an_interval_around_it():
    base, stage, merged = right((0, 400)), right((1, 300), (0, 100)), right((0, 30), (1, 270), (0, 100))
    low, high = retention_interval(base, stage, merged)
    assert low < 0.9 < high and high - low == pytest.approx(2 * 1.96 * np.sqrt(0.9 * 0.1 / 300), rel=0.2)


def test_two_calls_give_the_same():
    assert compare(*losses(3)) == compare(*losses(3))
