"""Changes of tensors: their rounding, their inner products, a piece at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from analysis.changes.measured import Matrix
from stages.models.architecture import Architecture

NOISE = 4 * torch.finfo(torch.float32).eps  # of a number, which computing with it makes
CHUNK = 1 << 18  # entries that are looked at together: few enough to stay in the processor's cache


@dataclass(frozen=True)
class TensorChange:
    """What a checkpoint changes in one tensor; all tensors are of one shape.

    Attributes:
        weight: before the change, float32.
        delta: the change, float32.
        exact: after the change, float32.
        file: the same as it is stored, in the file's dtype.
        unit_gain: whether it is the weight of a norm that multiplies by 1 + weight.
    """

    weight: torch.Tensor
    delta: torch.Tensor
    exact: torch.Tensor
    file: torch.Tensor
    unit_gain: bool = False

    @property
    def factor(self) -> torch.Tensor:
        """What the model multiplies by, whose size a change is compared with."""
        return self.weight + 1 if self.unit_gain else self.weight

    @property
    def error(self) -> torch.Tensor:
        """What the file's dtype alters, float32."""
        return self.file.float() - self.exact

    @cached_property
    def asked(self) -> torch.Tensor:
        """The change before it is rounded: of a merge, what its method leaves of the stages' changes."""
        return self.exact - self.weight

    @property
    def stored(self) -> torch.Tensor:
        """What of it the file holds: how far it is from the old weights rounded to its dtype, float32."""
        return self.file.float() - self.weight.to(self.file.dtype).float()

    @cached_property
    def is_moved(self) -> torch.Tensor:
        """Which entries the change moves, by more than the last digits of float32 that computing a merge may alter."""
        return self.asked.abs() > NOISE * self.weight.abs()

    @cached_property
    def is_stored_as_before(self) -> torch.Tensor:
        """Which entries the file stores as it would without the change."""
        return self.file == self.weight.to(self.file.dtype)

    def pieces(self) -> Iterator[TensorChange]:
        """The same of CHUNK entries after another."""
        for weight, delta, exact, file in chunks(self.weight, self.delta, self.exact, self.file):
            yield dataclasses.replace(self, weight=weight, delta=delta, exact=exact, file=file)


def has_unit_gain(architecture: Architecture, path: str, parameter: str) -> bool:
    """Whether a parameter is the weight of a norm that multiplies by 1 + weight."""
    module = architecture.modules.get(path)
    return parameter == "weight" and module is not None and module.unit_gain


def inner_products(deltas: list[torch.Tensor]) -> Matrix:
    """⟨Δᵢ,Δⱼ⟩ of all pairs, float64 [deltas, deltas]; only a chunk of the deltas is float64 at one time."""
    total = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
    for pieces in chunks(*deltas):
        rows = torch.stack(pieces).double()
        total += rows @ rows.T
    return total.numpy()


def spacing(values: torch.Tensor) -> torch.Tensor:
    """Distance to the next number of the same dtype, float32; 0 for 0."""
    powers = (values.float().view(torch.int32) & 0x7F800000).view(torch.float32)  # of two, by the exponent's bits
    return powers * torch.finfo(values.dtype).eps


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """The largest difference of two tensors of one shape, 0 where they are equal to the bit."""
    return 0.0 if torch.equal(first, second) else float((first.double() - second.double()).abs().max())


def chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same CHUNK entries of tensors of one shape, and then the next."""
    return zip(*(tensor.flatten().split(CHUNK) for tensor in tensors), strict=True)
