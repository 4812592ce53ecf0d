"""How many directions a change uses: singular values of a delta, exact from its factors where it has them."""

from __future__ import annotations

import torch

from stages.weights.adapter import Factors


def singular_values(delta: torch.Tensor, factors: Factors | None = None) -> torch.Tensor:
    """Singular values of a weight delta, largest first, float64.

    Of low-rank factors B A they are those of the core R_B R_Aᵀ of two QR decompositions, [r], and no noise fills the
    other directions. Of a dense delta they are the square roots of the eigenvalues of its smaller Gram matrix,
    [min(out, in)]; those below 1e-8 of the largest are not resolved.

    Args:
        delta: [out, in].
        factors: left [out, r] and right [r, in] whose product it is, if it has them.
    """
    if factors is not None:
        left, right = (torch.linalg.qr(side.double(), mode="r").R for side in (factors[0], factors[1].T))
        return torch.linalg.svdvals(left @ right.T)
    tall = (delta if delta.shape[0] >= delta.shape[1] else delta.T).double()
    return torch.linalg.eigvalsh(tall.T @ tall).clamp(min=0).sqrt().flip(0)


def effective_rank(values: torch.Tensor) -> float:
    """exp of the entropy of σ²/Σσ²: how many directions of equal strength would spread as much (Roy & Vetterli 2007).

    With σ² and not σ, as energy is what a relative change measures; not a number for a delta of zero.
    """
    energy = values.square() / values.square().sum()
    return float(torch.exp(-torch.xlogy(energy, energy).sum()))


def spectrum(delta: torch.Tensor, factors: Factors | None = None) -> dict[str, float]:
    """How strong a weight delta is and how many directions it uses: the columns SPECTRUM of `Measured.rows`.

    An expert is a matrix of its own: of a stack of them the strongest is told, and else the mean over those changed.

    Args:
        delta: [out, in] or [experts, out, in], not zero.
        factors: as in `singular_values`, of a stack [experts, out, r] and [experts, r, in].
    """
    if delta.dim() == 3:
        pairs = zip(*factors, strict=True) if factors else [None] * len(delta)
        each = [spectrum(one, pair) for one, pair in zip(delta, pairs, strict=True) if one.any()]
        means = {key: sum(found[key] for found in each) / len(each) for key in each[0]}
        return means | {"spectral_norm": max(found["spectral_norm"] for found in each)}
    values = singular_values(delta, factors)
    return {
        "spectral_norm": float(values[0]),
        "stable_rank": float(values.square().sum() / values[0].square()),
        "effective_rank": effective_rank(values),
        "directions": len(values),
    }
