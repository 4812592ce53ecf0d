"""Directions of the changes: how far stages share them, and whether a change brought in ones that are new.

Everything is about the strongest singular directions of a weight matrix's delta, [out, in]; those on the left are
what it writes, those on the right what it reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from analysis.changes.measured import STRONGEST, TESTED
from stages.weights.adapter import Factors

SPARE = 16  # more of them, and so many repetitions, make the randomised decomposition exact for those
REPEATED = 4
THRESHOLD = 0.5  # a direction is new if its cosine with every old one is below (arXiv 2410.21228)
NEIGHBOURS = 32  # old directions that a first test looks at
MARGIN = 0.1  # what that test may be wrong by
AGAIN = 4  # steps towards the exact directions where it does not decide
STEPS = 32  # of the Lanczos process, which decides the rest
FAINT = 0.01  # strength, beside the strongest, below which an old direction is none

Tensor = torch.Tensor


@dataclass(frozen=True)
class Directions:
    """Singular directions, the strongest first, float64: left [out, k], strength σ [k], right [in, k]."""

    left: Tensor
    strength: Tensor
    right: Tensor


def strongest(matrix: Tensor, factors: Factors | None = None, count: int = STRONGEST) -> Directions:
    """The `count` strongest directions of a matrix [out, in], or all it has.

    They are exact from low-rank factors (two QR decompositions and the SVD of their core), else by randomised
    subspace iteration (Halko et al. 2011, as in `torch.svd_lowrank`) from a fixed seed.
    """
    if factors is not None:
        (left, above), (right, below) = (torch.linalg.qr(side.double()) for side in (factors[0], factors[1].T))
        u, s, v = torch.svd(above @ below.T)
        u, v = left @ u, right @ v
    elif count + SPARE >= min(matrix.shape):
        u, s, v = torch.svd(matrix.double())
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix.float(), q=count + SPARE, niter=REPEATED)
    return Directions(u[:, :count].double(), s[:count].double(), v[:, :count].double())


def overlap(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Mean squared cosine of the principal angles between two subspaces, and that of random ones.

    Args:
        first: orthonormal columns [d, k].
        second: the same [d, l].

    Returns:
        ‖firstᵀ second‖² / min(k, l), from 0 to 1, and its expectation max(k, l) / d.
    """
    sizes = first.shape[1], second.shape[1]
    return float((first.T @ second).square().sum()) / min(sizes), max(sizes) / len(first)


def overlap_spread(first: Tensor, second: Tensor) -> float:
    """Standard deviation of `overlap` for random subspaces of these sizes.

    tr(PQ) of projections onto k and l of d dimensions, one of which is rotated at random, has the mean kl/d and the
    variance 2kl(d−k)(d−l) / (d²(d−1)(d+2)): the part of P without a trace, of squared norm k(d−k)/d, is turned evenly
    through the (d−1)(d+2)/2 dimensions of such symmetric matrices. For k = l = 1 that is cos², a Beta(½, (d−1)/2).
    """
    size, one, other = len(first), first.shape[1], second.shape[1]
    if size == 1:
        return 0.0
    variance = 2 * one * other * (size - one) * (size - other) / (size**2 * (size - 1) * (size + 2))
    return math.sqrt(variance) / min(one, other)


def interference(stages: list[Directions]) -> tuple[float, float]:
    """Singular task interference ‖(UᵀU − I) Σ (VᵀV − I)‖₁ (arXiv 2412.00081), and that of unrelated stages.

    U, Σ and V are the stages' directions side by side. Inner products of unrelated ones are nearly normal with variance
    1/d, and so each entry of the product is nearly normal too, with the variance of its sum.
    """
    strength = torch.cat([each.strength for each in stages])
    left, right = (_cross([getattr(each, side) for each in stages]) for side in ("left", "right"))
    blocks = [torch.ones(len(each.strength), len(each.strength), dtype=strength.dtype) for each in stages]
    apart = 1 - torch.block_diag(*blocks)  # whether two directions are of different stages
    variance = (apart * strength.square() @ apart) / (len(stages[0].left) * len(stages[0].right))
    return float((left * strength @ right).abs().sum()), float((2 / math.pi * variance).sqrt().sum())


def _cross(sides: list[Tensor]) -> Tensor:
    together = torch.cat(sides, 1)
    return together.T @ together - torch.eye(together.shape[1], dtype=together.dtype)


class BaseDirections:
    """The directions that a weight matrix wrote before it was changed.

    Args:
        weight: [out, in].
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def intruders(self, changed: Tensor, added: Tensor) -> int:
        """How many of the TESTED strongest directions of `changed` resemble none of the old (arXiv 2410.21228).

        An intruder's cosine with every left singular vector of the old weights is below THRESHOLD. The NEIGHBOURS
        strongest of the old decide most. Where they cannot, the directions are found more exactly and `largest_share`
        tells; a full decomposition would take ten times as long.

        Args:
            changed: [out, in].
            added: directions that the change writes [out, n]; `changed` is looked at among the old ones and these.
        """
        near = leading(changed, torch.cat([self._neighbours, added], 1), steps=0)
        cosines = (self._neighbours.T @ near[:, :TESTED]).abs()  # [neighbours, looked at]
        known = cosines.amax(0) >= THRESHOLD + MARGIN
        # What lies outside the neighbours is at most that near to any other direction.
        outside = (1 - cosines.square().sum(0)).clamp(min=0).sqrt()
        new = (cosines.amax(0) < THRESHOLD - MARGIN) & (outside < THRESHOLD - MARGIN)
        if bool((known | new).all()):
            return int(new.sum())
        exact = leading(changed, near, steps=AGAIN)[:, :TESTED]
        undecided = (self._neighbours.T @ exact).abs().amax(0) < THRESHOLD + MARGIN
        return int((largest_share(self._weight, exact[:, undecided]) < THRESHOLD**2).sum())

    @cached_property
    def _neighbours(self) -> Tensor:
        return strongest(self._weight, count=NEIGHBOURS).left


def leading(matrix: Tensor, start: Tensor, steps: int) -> Tensor:
    """Left singular vectors of a matrix, the strongest first, by steps of subspace iteration (Halko et al. 2011).

    Args:
        matrix: [out, in].
        start: columns [out, n] whose span holds the wanted directions nearly.
        steps: each brings the span nearer to the n strongest.

    Returns:
        float64 [out, n], of which the last ones are the least exact.
    """
    matrix, basis = matrix.float(), torch.linalg.qr(start.float()).Q
    for _ in range(steps):
        basis = torch.linalg.qr(matrix @ (matrix.T @ basis)).Q
    inside = (basis.T @ matrix).double()
    return basis.double() @ torch.linalg.eigh(inside @ inside.T).eigenvectors.flip(1)


def largest_share(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Squared cosine of each vector with that left singular vector of `matrix` to which it is nearest.

    STEPS of the Lanczos process from a vector make a quadrature whose weights are what the vector has of each singular
    direction (Golub & Meurant 2010), once these come apart. A share that is large comes apart first: from about 0.2 on
    it is exact, and small shares, which are lumped together, stay below that. Directions fainter than FAINT of the
    strongest count as none.

    Args:
        matrix: [out, in].
        vectors: [out, n], each of length 1.

    Returns:
        float64 [n].
    """
    matrix = matrix.float()
    basis, diagonal, beside = [vectors.float().T.contiguous()], [], []  # as rows: few columns multiply ten times slower
    for _ in range(STEPS):
        grown = (matrix @ (basis[-1] @ matrix).T).T
        diagonal.append((basis[-1] * grown).sum(1))
        for _ in range(2):  # rounding leaves something of the earlier vectors the first time
            for earlier in basis:
                grown = grown - earlier * (earlier * grown).sum(1, keepdim=True)
        beside.append(grown.norm(dim=1))
        basis.append(grown / beside[-1].clamp(min=torch.finfo(torch.float32).tiny)[:, None])
    above = torch.stack(beside[:-1], 1).diag_embed(1)
    nodes, directions = torch.linalg.eigh((torch.stack(diagonal, 1).diag_embed() + above + above.mT).double())
    strong = nodes > FAINT**2 * nodes.amax(1, keepdim=True)
    return (directions[:, 0].square() * strong).amax(1)
