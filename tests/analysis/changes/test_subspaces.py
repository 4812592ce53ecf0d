"""Directions of changes against dense float64 algebra, random subspaces and planted ones."""

import numpy as np
import pytest
import torch

from analysis.changes.deltas import measure
from analysis.changes.subspaces import (
    BaseDirections,
    Directions,
    interference,
    largest_share,
    overlap,
    overlap_spread,
    strongest,
)
from stages.merging.merged import Merged, open_merged
from stages.project.params import load_params
from stages.weights.checkpoint import open_stages


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def subspace(size, count, seed=0):
    return torch.linalg.qr(normal(size, count, seed=seed)).Q


def spectrum(out, inside, strength, seed=0):
    """A matrix with these singular values."""
    left, right = (subspace(size, len(strength), seed + place) for place, size in enumerate((out, inside)))
    return left * torch.tensor(strength, dtype=torch.float64) @ right.T


@pytest.mark.parametrize("from_factors", [True, False])
def test_directions_are_those_of_a_dense_decomposition(from_factors):
    left, right = normal(200, 8, seed=1), normal(8, 150, seed=2)
    found = strongest(left @ right, (left, right) if from_factors else None, count=4)
    u, s, v = np.linalg.svd((left @ right).numpy())
    assert found.strength.numpy() == pytest.approx(s[:4], rel=1e-5)
    assert np.abs(u[:, :4].T @ found.left.numpy()) == pytest.approx(np.eye(4), abs=1e-4)
    assert np.abs(v[:4] @ found.right.numpy()) == pytest.approx(np.eye(4), abs=1e-4)


def test_random_subspaces_overlap_as_often_as_chance_says():
    pairs = [overlap(subspace(400, 16, seed), subspace(400, 8, seed + 100)) for seed in range(20)]
    assert np.mean([found for found, _ in pairs]) == pytest.approx(pairs[0][1], rel=0.1)
    assert pairs[0][1] == 16 / 400


@pytest.mark.parametrize(("size", "first", "second"), [(4, 1, 1), (32, 4, 16), (24, 8, 8), (5, 5, 2)])
def test_overlaps_of_random_subspaces_spread_as_the_formula_says(size, first, second):
    fixed = subspace(size, first)
    found = [overlap(fixed, subspace(size, second, seed))[0] for seed in range(1, 2001)]
    assert np.std(found) == pytest.approx(overlap_spread(fixed, subspace(size, second)), rel=0.06, abs=1e-12)


def test_a_subspace_overlaps_with_one_that_holds_it_and_not_with_its_complement():
    whole = subspace(50, 20)
    assert overlap(whole[:, :5], whole[:, :12])[0] == pytest.approx(1)
    assert overlap(whole[:, :5], whole[:, 5:])[0] == pytest.approx(0, abs=1e-20)


def directions(size, count, seed):
    return Directions(
        subspace(size, count, seed), torch.linspace(2, 1, count).double(), subspace(size, count, seed + 1)
    )


def test_unrelated_stages_interfere_as_much_as_chance_says():
    ratios = [np.divide(*interference([directions(500, 16, 10 * i + 2 * j) for j in range(3)])) for i in range(10)]
    assert np.mean(ratios) == pytest.approx(1, abs=0.03)


def test_interference_by_hand():
    alike = directions(40, 6, 0)
    found, by_chance = interference([alike, alike])
    assert found == pytest.approx(2 * float(alike.strength.sum()))  # every pair of the same direction has σ
    assert found > by_chance
    other = Directions(subspace(40, 12)[:, 6:], alike.strength, subspace(40, 12, 1)[:, 6:])
    one = Directions(subspace(40, 12)[:, :6], alike.strength, subspace(40, 12, 1)[:, :6])
    assert interference([one, other])[0] == pytest.approx(0, abs=1e-12)


def dense_intruders(weight, changed):
    old, new = (np.linalg.svd(each.numpy())[0] for each in (weight, changed))
    return int((np.abs(old.T @ new[:, :10]).max(0) < 0.5).sum())


@pytest.mark.parametrize("shape", [(60, 40), (160, 220), (220, 160)])
@pytest.mark.parametrize("planted", [0, 3])
def test_planted_intruders_are_found(shape, planted):
    weight = spectrum(*shape, [20 * 0.95**i for i in range(min(shape))])
    change = 1e-3 * normal(*shape, seed=9)
    if planted:
        change += spectrum(*shape, [30.0] * planted, seed=50)
    found = BaseDirections(weight).intruders(weight + change, strongest(change).left)
    assert found == dense_intruders(weight, weight + change)
    assert planted - 1 <= found <= planted  # a random direction can by chance be near to an old one


@pytest.mark.parametrize(("strength", "intruders"), [(0.05, 0), (80.0, 10)])
def test_where_no_direction_is_much_stronger_than_the_next(strength, intruders):
    weight = normal(300, 200, seed=3)
    change = spectrum(300, 200, [strength + i for i in range(10, 0, -1)] if intruders else [strength], seed=7)
    found = BaseDirections(weight).intruders(weight + change, strongest(change).left)
    assert found == dense_intruders(weight, weight + change) == intruders


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (400, 300), (300, 400)])
def test_large_shares_are_those_of_a_dense_decomposition_and_small_ones_stay_small(shape):
    rank = min(shape)
    weight = spectrum(*shape, [20 * 0.95 ** (i * 40 / rank) for i in range(rank)])
    left = torch.linalg.svd(weight).U[:, :rank]
    random = subspace(shape[0], 5, seed=30)
    parts = [0.64**0.5 * left[:, [3]] + 0.36**0.5 * left[:, [20]]]
    parts += [share**0.5 * left[:, [3]] + (1 - share) ** 0.5 * random[:, [0]] for share in (0.2, 0.24, 0.26, 0.3)]
    near = torch.nn.functional.normalize(torch.cat([left[:, :2], *parts], 1), dim=0)
    assert largest_share(weight, near).tolist() == pytest.approx((left.T @ near).square().amax(0).tolist(), abs=1e-3)
    assert largest_share(weight, random).max() < 0.2


def test_stages_from_one_seed_read_the_same_and_others_do_not(project):
    def measured():
        settings = load_params()
        base, stages = open_stages(list(settings.stages))
        return measure(stages, Merged(base, stages, settings.merge), open_merged(base, stages, settings.merge))

    project.merge()
    apart = measured()
    assert set(zip(apart.pairs["first"], apart.pairs["second"], strict=True)) == {("sums", "names")}
    assert len(apart.pairs) == 7 and set(apart.pairs["layer"]) == {1}
    assert (apart.conflicts["interference"] > 0).all()
    assert apart.rows[apart.rows["layer"] == 1].dropna(subset=["effective_rank"])["intruders"].notna().all()
