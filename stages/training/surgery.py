"""Gradients of several sources, combined so that none is harmed."""

from __future__ import annotations

import torch


def combine(gradients: torch.Tensor, method: str) -> torch.Tensor:
    """One direction [P] from the gradients [k, P] of k sources, by the aggregator of that name.

    `upgrad` (arXiv 2406.16232) projects every gradient so that it harms no other, and averages; `pcgrad` (arXiv
    2001.06782) does so in random order, `mgda` takes the shortest convex combination, `aligned_mtl` (arXiv 2305.19000)
    makes them equally strong first.
    """
    from torchjd import aggregation

    aggregators = {
        "upgrad": aggregation.UPGrad,
        "pcgrad": aggregation.PCGrad,
        "mgda": aggregation.MGDA,
        "aligned_mtl": aggregation.AlignedMTL,
    }
    return aggregators[method]()(gradients)
