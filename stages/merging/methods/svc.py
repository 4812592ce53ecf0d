"""SVC: the sum of the deltas, with the directions that several stages share no longer counted several times."""

from typing import Annotated

import torch
from mergekit.merge_methods import PerNonBase, TensorGroup
from pydantic import Field
from torch import Tensor

from stages.merging.method import merge_method, onto_base, weighted_deltas
from stages.merging.spectral import as_matrix, noise_floor, thin_svd


@merge_method("https://arxiv.org/abs/2602.05536", rotation_free=True)
def svc(group: TensorGroup, weight: PerNonBase[float], alpha: Annotated[float, Field(gt=0)] = 1.0) -> Tensor:
    """The sum, with directions that several stages share counted once (Singular Value Calibration).

    It is base + Σᵣ γʳ·σʳ·uʳ·vʳᵀ, where U, σ and V are of Δ, the sum of the K weighted deltas Δᵢ. Along an output
    direction, stage i responds with aᵢʳ = uʳᵀ·Δᵢ and the sum with aʳ = uʳᵀ·Δ; sᵢʳ = ⟨aʳ, aᵢʳ⟩ / ‖aᵢʳ‖² says how many
    times over the sum holds the stage, and γʳ = K / Σᵢ max(α, sᵢʳ).

    Deviations: K counts the stages that respond to uʳ at all, since sᵢʳ of the others is 0/0. The paper compares
    with the unweighted deltas, which undoes the weights. Its α is 1/K, which also strengthens directions in which
    stages cancel; the default here, 1, only weakens (the paper's own choice on top of TSV-M). A vector is one row,
    for which this is the paper's formula for vectors with α added; the last axes of other tensors are flattened.

    Args:
        group: the base and at least one model of its shape.
        weight: of each stage; its delta is multiplied by it first.
        alpha: lower bound of sᵢʳ, above 0; singular values grow at most 1/alpha times.

    Returns:
        The merged weights, of the base's shape and dtype.
    """
    deltas = [as_matrix(delta) for delta in weighted_deltas(group, weight)]
    u, s, vh = thin_svd(torch.stack(deltas).sum(0))
    held = torch.stack([_times_held(s[:, None] * vh, u.T @ delta, noise_floor(delta)) for delta in deltas])
    gamma = held.clamp(min=alpha).nanmean(0).reciprocal().nan_to_num(nan=1.0)
    return onto_base(group, (u * gamma * s) @ vh)


def _times_held(total: Tensor, own: Tensor, floor: Tensor) -> Tensor:
    """sᵢʳ of one stage [r] from the responses of the sum and the stage [r, in]; NaN where it does not respond."""
    energy = own.square().sum(1)
    return torch.where(energy > floor.square(), (total * own).sum(1) / energy, torch.nan)
