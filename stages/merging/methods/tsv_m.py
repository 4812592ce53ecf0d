"""TSV-M: the top singular vectors of every stage, made orthogonal to each other."""

import torch
from mergekit.merge_methods import PerNonBase, TensorGroup
from torch import Tensor

from stages.merging.method import merge_method, onto_base, weighted_deltas
from stages.merging.spectral import average, polar_factor, thin_svd


@merge_method("https://arxiv.org/abs/2412.00081", rotation_free=True)
def tsv_m(group: TensorGroup, weight: PerNonBase[float], scale: float = 1.0) -> Tensor:
    """The top singular vectors of every stage, made orthogonal to each other (TSV-Merge).

    It is base + scale · Û·S·V̂ᵀ (the paper's algorithm 1), where U, S and V are the concatenated top singular vectors
    and values of the T weighted deltas; Û and V̂ are the polar factors of U and V, so that stages no longer interfere.

    Deviations: the paper keeps min(out, in) // T of each stage. That is only needed where more do not fit, so
    deltas whose ranks add up to at most min(out, in), as LoRA's do, keep everything, and the result is the same
    in core space. Directions with numerically zero singular values are left out, and stages without a delta do
    not count for T. Tensors that are no matrices are averaged and scaled, as in the authors' code.

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
    parts = _fit([thin_svd(delta) for delta in deltas], min(deltas[0].shape))
    u = polar_factor(torch.cat([u for u, _, _ in parts], 1))
    s = torch.cat([s for _, s, _ in parts])
    vh = polar_factor(torch.cat([vh for _, _, vh in parts]))
    return onto_base(group, scale * (u * s) @ vh)


def _fit(parts: list[tuple[Tensor, Tensor, Tensor]], limit: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The top singular triplets of each stage, no more than `limit` of them together, but one of each."""
    ranks = [len(s) for _, s, _ in parts if len(s)]
    k = limit if sum(ranks) <= limit else max(1, limit // len(ranks))
    return [(u[:, :k], s[:k], vh[:k]) for u, s, vh in parts]
