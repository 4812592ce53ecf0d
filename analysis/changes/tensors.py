"""Norms, inner products and rounding of tensors, a chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from analysis.changes.measured import Matrix

CHUNK = 1 << 18  # entries that are looked at together: few enough to stay in the processor's cache


def inner_products(deltas: list[torch.Tensor]) -> Matrix:
    """⟨Δᵢ,Δⱼ⟩ of all pairs, float64 [deltas, deltas]; only a chunk of the deltas is float64 at one time."""
    total = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
    for parts in chunks(*deltas):
        rows = torch.stack(parts).double()
        total += rows @ rows.T
    return total.numpy()


def rounding(weight: torch.Tensor, changed: torch.Tensor, file: torch.Tensor) -> dict[str, float]:
    """What the file's dtype loses of changed weights.

    Args:
        weight: before the change, float32.
        changed: the exact ones, float32.
        file: the same as they are stored.

    Returns:
        error: ‖file − changed‖, and how many entries are `unchanged`, stored as they would be without the change.
    """
    error, unchanged = 0.0, 0
    for before, exact, kept in chunks(weight, changed, file):
        error += float((kept.float() - exact).square().sum())
        unchanged += int(torch.count_nonzero(kept == before.to(kept.dtype)))
    return {"error": error**0.5, "unchanged": unchanged}


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """The largest difference of two tensors of one shape, 0 where they are equal to the bit."""
    return 0.0 if torch.equal(first, second) else float((first.double() - second.double()).abs().max())


def norm(values: torch.Tensor) -> float:
    """Frobenius norm, summed in float64."""
    # float32 would lose digits over millions of entries
    return sum(float(part.double().square().sum()) for (part,) in chunks(values)) ** 0.5


def chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same CHUNK entries of tensors of one shape, and then the next."""
    return zip(*(tensor.flatten().split(CHUNK) for tensor in tensors), strict=True)
