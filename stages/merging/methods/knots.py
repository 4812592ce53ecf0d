"""KnOTS-TIES: TIES in a basis of output directions that the stages share."""

from typing import Annotated

import torch
from mergekit.merge_methods import PerNonBase, TensorGroup, merge_tensors
from pydantic import Field
from torch import Tensor

from stages.merging.method import merge_method, onto_base, weighted_deltas
from stages.merging.spectral import as_matrix, thin_svd


@merge_method("https://arxiv.org/abs/2410.19735")
def knots(
    group: TensorGroup,
    weight: PerNonBase[float],
    density: PerNonBase[Annotated[float, Field(gt=0, le=1)]] = 1.0,
    scale: float = 1.0,
) -> Tensor:
    """TIES in a basis of output directions that the stages share (KnOTS).

    It is base + scale · U · TIES(S·V₁ᵀ, …, S·V_Tᵀ), where U·S·[V₁ᵀ … V_Tᵀ] decomposes the weighted deltas set side
    by side, [out, T·in]. TIES is mergekit's: trim to the density, elect the sign of the sum, average those that have
    it (the authors' `mean`).

    Deviations: entries are trimmed tensor by tensor, as mergekit does, not over the whole model; singular values
    that are numerically zero are cut relative to the largest, not at 1e-5. Vectors are one row, for which KnOTS is
    plain TIES, and the last axes of other tensors are flattened, both as in the authors' code.

    TIES works entry by entry on input coordinates: in core space the result is another one.

    Args:
        group: the base and at least one model of its shape.
        weight: of each stage; its delta is multiplied by it first.
        density: share of its entries that each stage keeps, above 0 to 1; 1 in the authors' runs on Llama 3,
            0.2 in those on vision models.
        scale: of the merged delta; the authors tune it.

    Returns:
        The merged weights, of the base's shape and dtype.
    """
    deltas = [as_matrix(delta) for delta in weighted_deltas(group, weight)]
    u, s, vh = thin_svd(torch.cat(deltas, 1))
    blocks = (s[:, None] * vh).split(deltas[0].shape[1], 1)
    merged = merge_tensors(
        [torch.zeros_like(blocks[0]), *blocks],
        "ties",
        base_index=0,
        parameters={"weight": 1.0, "density": density.values_for(group.non_base)},
    )
    return onto_base(group, scale * u @ merged)
