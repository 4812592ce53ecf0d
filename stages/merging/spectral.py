"""What the methods that work on singular values share."""

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps


def average(deltas: list[Tensor]) -> Tensor:
    """The mean of the deltas, of their shape: what TSV-M's and Iso's authors do with all that is no matrix."""
    return torch.stack(deltas).mean(0)


def as_matrix(delta: Tensor) -> Tensor:
    """A tensor of any rank as [out, in]: a vector is one row, the last axes of a convolution are flattened."""
    return delta.reshape(1, -1) if delta.dim() < 2 else delta.flatten(1)


def noise_floor(matrix: Tensor) -> Tensor:
    """The norm, a scalar in the matrix's units, below which a projection of it may be float32 rounding."""
    return max(matrix.shape) * EPS * torch.linalg.matrix_norm(matrix)


def thin_svd(matrix: Tensor, floor: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition without the directions of numerically zero singular values.

    Those directions are arbitrary: a LoRA delta of rank 16 has 16 that mean something, whatever its shape.

    Args:
        matrix: [m, n], float32.
        floor: singular values up to here are zero; by default max(m, n)·eps times the largest.

    Returns:
        u [m, k], s [k] in descending order, vh [k, n]; k is 0 for a matrix of zeros.
    """
    u, s, vh = _svd(matrix)
    keep = s > (max(matrix.shape) * EPS * s[:1] if floor is None else floor)
    return u[:, keep], s[keep], vh[keep]


def polar_factor(vectors: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (or rows), of the same shape (orthogonal Procrustes).

    Where the vectors are linearly dependent it is the nearest partial isometry, which spans nothing that they do
    not span. The singular values of concatenated orthonormal vectors are about 1; those below √eps are the
    rounding of vectors that two stages share.
    """
    u, s, vh = _svd(vectors)
    keep = s > EPS**0.5
    return u[:, keep] @ vh[keep]


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD; in float32 LAPACK gives up on some matrices with many equal singular values."""
    try:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:
        u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u.to(matrix.dtype), s.to(matrix.dtype), vh.to(matrix.dtype)
