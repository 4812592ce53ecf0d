"""From float32 to the 16 bits of a file."""

import torch

PART = 1 << 16  # entries that are rounded at once: few enough to stay in the processor's cache


def round_stochastically(values: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Each number as one of its two neighbours in `dtype`, the nearer the likelier, so that on average it is itself.

    A change far smaller than the spacing of the neighbours is gone when every number goes to the nearest; here as many
    numbers move as make up its sum (Gupta et al., arXiv 1502.02551). Numbers that `dtype` has stay as they are.

    Args:
        values: float32, of any shape.
        dtype: of 16 bits; in one with more nothing is rounded.
        generator: of the random numbers, one for each entry.
    """
    rounded = values.to(dtype)
    if dtype.itemsize > 2:
        return rounded
    for near, exact in zip(rounded.view(-1).split(PART), values.reshape(-1).split(PART), strict=True):
        bits = near.view(torch.int16)  # of two neighbours with one sign, they differ by one
        step = torch.where(exact.abs() >= near.abs().float(), 1, -1).to(torch.int16)
        other = (bits + step).view(dtype)
        likeliness = (exact - near.float()).abs() / (other.float() - near.float()).abs()
        bits += step * (torch.rand(exact.shape, generator=generator) < likeliness)
    return rounded
