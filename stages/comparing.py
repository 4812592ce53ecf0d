"""Whether one model answers better than another, on the same records: differences with what chance makes of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

DRAWS = 2000
AT_ONCE = 50  # draws in memory
LEVEL = 0.95
POWER = 0.8
FEWEST = 6  # records of which chance makes all better, or all worse, in less than one of twenty cases (2 / 2⁶)

Interval = list[float]  # its low and its high end


@dataclass(frozen=True)
class Scores:
    """What a model reached on each record; its mean is Σ values / Σ weights.

    Attributes:
        measure: `loss`, or what the mean of scores from 0 to 1 is called.
        values: Σwᵢlᵢ in nats, or the score, [records].
        weights: Σ|wᵢ|, or 1, [records].
    """

    measure: str
    values: np.ndarray
    weights: np.ndarray

    @property
    def mean(self) -> float:
        """Nats per token, or the mean score."""
        return float(self.values.sum() / self.weights.sum())

    def interval(self) -> Interval:
        """Of the mean."""
        return _ends(_resample([self], [[1.0], [0.0]])[:, 0])


@dataclass(frozen=True)
class Comparison:
    """Two models on the same records.

    Attributes:
        difference: of their means, the second less the first.
        interval: of the difference.
        p: the exact test's, where answers are right or wrong.
        needed: records that it takes to tell a difference of this size; None where there is none.
    """

    difference: float
    interval: Interval
    p: float | None
    needed: int | None

    @property
    def is_clear(self) -> bool:
        """Whether it is more than chance: the interval leaves zero out, and the exact test agrees."""
        low, high = self.interval
        return (low > 0 or high < 0) and (self.p is None or self.p <= 1 - LEVEL)


def compare(first: Scores, second: Scores) -> Comparison:
    """Compare two models on the same records, record by record."""
    imagined = [[1.0, 0.0], [0.0, 1.0]]
    draws = _resample([first, second], imagined)
    difference = second.mean - first.mean
    exact = first.measure == "accuracy"
    interval = _ends(draws[:, 1] - draws[:, 0])
    if len(first.values) < FEWEST:  # of one record a bootstrap has no width
        interval = [-first.mean, second.mean]  # either may be worth nothing
    return Comparison(
        difference,
        interval,
        exact_p(int((first.values > second.values).sum()), int((first.values < second.values).sum()))
        if exact
        else None,
        _needed(difference, [first, second], imagined),
    )


def retention_interval(base: Scores, stage: Scores, merged: Scores) -> Interval:
    """Of the share of the stage's gain over the base that the merged model keeps, where there was a gain."""
    draws = _resample([base, stage, merged], [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    gains, kept = draws[:, 1] - draws[:, 0], draws[:, 2] - draws[:, 0]
    gained = gains * (stage.mean - base.mean) > 0
    return _ends(kept[gained] / gains[gained])


def exact_p(lost: int, won: int) -> float:
    """McNemar's exact test: how probable a split at least as uneven is where losing and winning are alike, two-sided.

    Args:
        lost: records that the first model alone answers rightly.
        won: records that the second alone does.
    """
    together = lost + won
    tail = sum(math.comb(together, number) for number in range(min(lost, won) + 1))
    return min(1.0, 2 * tail / 2**together)


def _resample(models: list[Scores], imagined: list[list[float]]) -> np.ndarray:
    """Means of every model over records drawn with replacement, the same for all: [DRAWS, models]."""
    values, weights = _with_imagined(models, imagined)
    count, generator = len(values), np.random.default_rng(0)
    found = []
    for _ in range(DRAWS // AT_ONCE):
        drawn = generator.integers(count, size=(AT_ONCE, count))
        found.append(values[drawn].sum(1) / weights[drawn].sum(1))
    return np.concatenate(found)


def _with_imagined(models: list[Scores], imagined: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Values and weights, [records, models], with two imagined records where scores have bounds.

    Of ten answers that are all right a bootstrap says that none will ever be wrong. So one record is added that speaks
    for and one that speaks against, as Bonett and Price (2012, J. Educ. Behav. Stat. 37) do for paired shares.
    """
    values, weights = (np.column_stack([getattr(each, key) for each in models]) for key in ("values", "weights"))
    if models[0].measure == "loss":
        return values, weights
    return np.vstack([values, imagined]), np.vstack([weights, np.ones_like(imagined)])


def _ends(draws: np.ndarray) -> Interval:
    return np.percentile(draws, [50 * (1 - LEVEL), 50 * (1 + LEVEL)]).tolist()


def _needed(difference: float, models: list[Scores], imagined: list[list[float]]) -> int | None:
    """Records for a difference of this size to be told with POWER, n = ((z₁₋α/₂ + z₁₋β) σ / δ)².

    Lachin 1981 (Controlled Clinical Trials 2) for the mean of paired differences, whose spread σ is that of the
    records' shares in the difference (the delta method for a ratio of sums).
    """
    if not difference:
        return None
    values, weights = _with_imagined(models, imagined)
    shares = (values - weights * values.sum(0) / weights.sum(0)) / weights.mean(0)
    spread = float((shares[:, 1] - shares[:, 0]).std())
    reach = NormalDist().inv_cdf((1 + LEVEL) / 2) + NormalDist().inv_cdf(POWER)
    return math.ceil((reach * spread / difference) ** 2)
