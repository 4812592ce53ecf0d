"""The trimming step of TIES (arXiv 2306.01708) and Model Breadcrumbs (arXiv 2312.06795), without a full sort.

mergekit sorts every delta to find which entries to keep, which is most of the time of these methods. A
partition finds the thresholds alone, and keeps the same entries. Where entries have exactly one magnitude and only
some of them fit, it keeps the first; mergekit's sort is not stable and keeps any.
"""

from typing import Any

import numpy as np
import torch


def trim(deltas: dict[str, torch.Tensor], values: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Keep the entries of each delta that the method's density and gamma say, and zero the others.

    Args:
        deltas: by stage, float32; they are trimmed in place.
        values: of the method's parameters.

    Returns:
        The deltas, and the values with a density of 1, for mergekit's kernel to do the rest.
    """
    for stage, delta in deltas.items():
        density = values["density"][stage]
        if density < 1:
            count = delta.numel()
            if "gamma" in values:
                kept = int(density * count)
                lowest = max(0, count - kept - int(values["gamma"][stage] * count))
                mask = _largest(delta, count - lowest) & ~_largest(delta, count - lowest - kept)
            else:
                mask = _largest(delta, max(1, int(density * count)) if density > 0 else 0)
            delta.mul_(mask)
    return deltas, values | {"density": dict.fromkeys(values["density"], 1.0)}


def _largest(delta: torch.Tensor, count: int) -> torch.Tensor:
    """Mask of the `count` entries of largest magnitude, of the delta's shape."""
    if count == 0 or count >= delta.numel():
        return torch.full(delta.shape, count > 0)
    smaller = delta.numel() - count
    magnitude = delta.abs().flatten().numpy()
    magnitude.partition(smaller)  # in place, and computed again below: a delta may be large
    threshold = magnitude[smaller]
    del magnitude
    magnitude = delta.abs().flatten().numpy()
    mask = magnitude > threshold
    mask[np.flatnonzero(magnitude == threshold)[: count - int(mask.sum())]] = True
    return torch.from_numpy(mask).view_as(delta)
