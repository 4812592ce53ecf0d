"""What the changes of many tensors add up to: a row for each, and inner products by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

from analysis.changes.measured import Matrix
from analysis.changes.metrics import PARTS
from analysis.changes.tensors import TensorChange, inner_products

OVER: dict[str, Callable[[Iterable[float]], float]] = {"sum": sum, "max": max}


class Where(NamedTuple):
    """Where a tensor stands: its layer, the kind of its module, its name there, such as `weight`."""

    layer: int
    module: str
    parameter: str


class Tally:
    """Changes of several checkpoints, taken in tensor by tensor.

    Args:
        names: of the checkpoints.

    Attributes:
        rows: one per checkpoint and tensor that it changes; by name, the columns of `Measured.rows`.
        grams: by layer, inner products of the changes, float64 [names, names].
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.rows: list[dict[str, Any]] = []
        self.grams: dict[int, Matrix] = {}

    def add_row(self, name: str, where: Where, change: TensorChange) -> dict[str, Any]:
        """Take in what one checkpoint changes in one tensor; returns its row, for further columns."""
        self.rows.append({"stage": name} | where._asdict() | parts(change))
        return self.rows[-1]

    def add_products(self, layer: int, deltas: dict[str, torch.Tensor]) -> None:
        """Take in how the changes of one tensor lie to each other, by the checkpoints that change it."""
        here = [self.names.index(name) for name in deltas]
        gram = self.grams.setdefault(layer, np.zeros((len(self.names), len(self.names))))
        gram[np.ix_(here, here)] += inner_products(list(deltas.values()))


def parts(change: TensorChange) -> dict[str, float]:
    """The parts of all metrics of one tensor, by name."""
    pieces = [[part.of(piece) for part in PARTS] for piece in change.pieces()]
    return {part.name: OVER[part.over](values) for part, values in zip(PARTS, zip(*pieces, strict=True), strict=True)}
