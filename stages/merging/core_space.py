"""Merge low-rank deltas in the small space that all of them span, with any method."""

from collections.abc import Callable

import torch
from torch import Tensor


def merge_in_core(
    factors: dict[str, tuple[Tensor, Tensor]], kernel: Callable[[dict[str, Tensor]], Tensor]
) -> tuple[Tensor, Tensor]:
    """Merge deltas in core space (arXiv 2509.17786): nothing is lost, and the result is low-rank again.

    The joint bases are the singular vectors of the stacked factors, as in the paper. A QR of them spans the same
    space, but its axes depend on the order of the stages, and so would what a method like TIES, which works entry
    by entry, makes of the cores.

    Args:
        factors: by stage, left [out, r_i] and right [r_i, in], float32, delta = left @ right; at least one stage.
        kernel: merges the stages' cores, each [min(Σr, out), min(Σr, in)], float32, into one of that shape. The
            base is zero there: a core is a delta.

    Returns:
        left [out, R] and right [R, in], float32, R = min(Σr, out, in), of the merged delta left @ right. Both
        carry the square roots of its singular values, in descending order.
    """
    out_basis = _basis(torch.cat([left for left, _ in factors.values()], 1).double())
    in_basis = _basis(torch.cat([right.T for _, right in factors.values()], 1).double())
    cores = {
        stage: ((out_basis.T @ left.double()) @ (right.double() @ in_basis)).float()
        for stage, (left, right) in factors.items()
    }
    u, s, vh = torch.linalg.svd(kernel(cores).double(), full_matrices=False)
    root = s.sqrt()
    return (out_basis @ (u * root)).float(), (root[:, None] * vh @ in_basis.T).float()


def _basis(columns: Tensor) -> Tensor:
    """Orthonormal columns that span the given ones, strongest first."""
    return torch.linalg.svd(columns, full_matrices=False)[0]
