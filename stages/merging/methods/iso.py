"""Iso-C and Iso-CTS: all directions of the merged delta made equally strong."""

from typing import Annotated

import torch
from mergekit.merge_methods import PerNonBase, TensorGroup
from pydantic import Field
from torch import Tensor

from stages.merging.method import merge_method, onto_base, weighted_deltas
from stages.merging.spectral import average, noise_floor, polar_factor, thin_svd

PAPER = "https://arxiv.org/abs/2502.04959"


@merge_method(PAPER, rotation_free=True)
def iso_c(group: TensorGroup, weight: PerNonBase[float], scale: float = 1.0) -> Tensor:
    """All directions of the summed delta made equally strong (Iso-C).

    It is base + scale · σ̄·U·Vᵀ, where U, S and V are of the sum of the weighted deltas and σ̄ is the mean of S.

    Deviations: the paper's mean runs over min(out, in) singular values, and U·Vᵀ gives each of those directions
    weight; here both are restricted to those that are not numerically zero. For a sum of full rank that is the
    same; for LoRA it is what the paper's method gives in core space. Tensors that are no matrices are averaged
    and scaled, as in the authors' code.

    Args:
        group: the base and at least one model of its shape.
        weight: of each stage; its delta is multiplied by it first.
        scale: the paper's α, of the merged delta.

    Returns:
        The merged weights, of the base's shape and dtype.
    """
    deltas = weighted_deltas(group, weight)
    if deltas[0].dim() != 2:
        return onto_base(group, scale * average(deltas))
    u, s, vh = thin_svd(torch.stack(deltas).sum(0))
    return onto_base(group, scale * s.mean() * u @ vh)


@merge_method(PAPER, rotation_free=True)
def iso_cts(
    group: TensorGroup,
    weight: PerNonBase[float],
    common_fraction: Annotated[float, Field(ge=0, le=1)] = 0.8,
    scale: float = 1.0,
) -> Tensor:
    """Like `iso_c`, with the weakest directions replaced by each stage's own (Iso-CTS).

    Of the r directions of the summed deltas the weakest are replaced, in equal shares, by the strongest
    directions of what each stage has outside the rest (the common space, projected out on the left); all are
    made orthogonal by their polar factors and given the mean of their singular values.

    Deviations: the paper's r is min(out, in), here it is the numerical rank of the sum, which is the same at full
    rank and keeps LoRA deltas in the space they span. Numerically zero singular values count neither as
    directions nor in the mean. Tensors that are no matrices are averaged and scaled, as in the authors' code.

    Args:
        group: the base and at least one model of its shape.
        weight: of each stage; its delta is multiplied by it first.
        common_fraction: share of the r directions that the common space keeps, 0 to 1.
        scale: the paper's α, of the merged delta.

    Returns:
        The merged weights, of the base's shape and dtype.
    """
    deltas = weighted_deltas(group, weight)
    if deltas[0].dim() != 2:
        return onto_base(group, scale * average(deltas))
    u, s, vh = thin_svd(torch.stack(deltas).sum(0))
    own = _directions_per_stage(len(s), len(deltas), common_fraction)
    common = len(s) - len(deltas) * own
    parts = [(u[:, :common], s[:common], vh[:common])]
    if own:
        parts += [_top(_outside(delta, u[:, :common]), own) for delta in deltas]
    u = polar_factor(torch.cat([u for u, _, _ in parts], 1))
    vh = polar_factor(torch.cat([vh for _, _, vh in parts]))
    return onto_base(group, scale * torch.cat([s for _, s, _ in parts]).mean() * u @ vh)


def _directions_per_stage(rank: int, stages: int, common_fraction: float) -> int:
    """How many directions each stage gets: the authors' rounding to equal shares, kept within the rank."""
    return min(round((rank - int(rank * common_fraction)) / stages), rank // stages)


def _outside(delta: Tensor, common: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose what a delta [m, n] has outside the common space [m, k].

    The floor is the delta's own: what is left of a delta that lies inside is nothing but rounding.
    """
    return thin_svd(delta - common @ (common.T @ delta), noise_floor(delta))


def _top(parts: tuple[Tensor, Tensor, Tensor], k: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = parts
    return u[:, :k], s[:k], vh[:k]
