"""Spectra against a dense float64 SVD, and the ranks that are known."""

import numpy as np
import pytest
import torch

from analysis.changes.deltas import measure
from analysis.changes.spectra import effective_rank, singular_values
from stages.merging.merged import Merged, open_merged
from stages.project.params import load_params
from stages.weights.checkpoint import open_stages


def test_factors_give_the_singular_values_of_their_product():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(48, 6, generator=generator), torch.randn(6, 96, generator=generator)
    truth = np.linalg.svd(left.double().numpy() @ right.double().numpy(), compute_uv=False)
    found = singular_values(left @ right, (left, right))
    assert found.shape == (6,)
    assert np.allclose(found, truth[:6], rtol=1e-13)
    assert truth[6] < 1e-12 * truth[0]


@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (5, 5)])
def test_a_dense_delta_too(shape):
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    truth = np.linalg.svd(delta.double().numpy(), compute_uv=False)
    assert np.allclose(singular_values(delta), truth, rtol=1e-9)


def test_the_effective_rank_of_known_spectra():
    assert effective_rank(torch.ones(7, dtype=torch.float64)) == pytest.approx(7)
    assert effective_rank(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1)
    half = torch.tensor([3.0, 1.0], dtype=torch.float64)  # energies 0.9 and 0.1
    assert effective_rank(half) == pytest.approx(0.9**-0.9 * 0.1**-0.1)


def test_every_matrix_of_every_stage_has_the_spectrum_of_its_dense_delta(project):
    project.merge()
    settings = load_params()
    base, stages = open_stages(list(settings.stages))
    exact = Merged(base, stages, settings.merge)
    rows = measure(stages, exact, open_merged(base, stages, settings.merge)).rows
    lora = rows[rows["stage"] == "sums"].dropna(subset=["effective_rank"])
    assert len(lora) == 14 and set(lora["directions"]) == {16}
    assert rows[rows["stage"] == "prose"]["effective_rank"].min() > 16  # a full stage uses more than any LoRA here
    for stage in stages:
        own = rows[(rows["stage"] == stage.name) & rows["effective_rank"].notna()]
        row = own.iloc[0]
        path = f"model.layers.{row['layer']}.{row['module']}"
        truth = np.linalg.svd(stage.delta(path)["weight"].double().numpy(), compute_uv=False)
        assert row["spectral_norm"] == pytest.approx(truth[0], rel=1e-5)
        assert row["stable_rank"] == pytest.approx((truth**2).sum() / truth[0] ** 2, rel=1e-4)
    assert rows[rows["stage"] == "merged"]["effective_rank"].isna().all()
