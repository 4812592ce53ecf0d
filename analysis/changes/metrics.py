"""The numbers that the report tells of changed weights. To add one, add an entry to METRICS.

Measuring, the tables, deltas.parquet, both pages and `strata compare` go through that list. Importing it needs no
torch: an entry only calls methods of the tensors that it is given. Numbers of matrices that do not add up over
tensors, such as ranks, are in spectra.py and subspaces.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import pandas as pd

if TYPE_CHECKING:
    import torch

    from analysis.changes.tensors import TensorChange


@dataclass(frozen=True)
class Part:
    """A number of one tensor that adds up, so that a layer's or a model's is exact and no mean of ratios.

    Attributes:
        name: its column in the table of tensors.
        of: computes it from a change, or from a piece of one.
        over: how the numbers of pieces, and then of tensors, become one.
    """

    name: str
    of: Callable[[TensorChange], float]
    over: Literal["sum", "max"] = "sum"


@dataclass(frozen=True)
class Metric:
    """A number of a change of weights: of a tensor, a layer or a model.

    Attributes:
        name: in tables and files.
        heading: of its column in a page.
        about: what it is, in one or two sentences.
        parts: what it is made of.
        value: makes it of the parts, each a column of totals; not a number where it has no value.
        is_share: whether it is told in percent, else as a plain number.
    """

    name: str
    heading: str
    about: str
    parts: tuple[Part, ...]
    value: Callable[..., pd.Series]
    is_share: bool = True


def _inner(first: torch.Tensor, second: torch.Tensor) -> float:
    """Σxy, summed in float64, for float32 loses digits over millions of entries."""
    return float(first.double().flatten() @ second.double().flatten())


def _squares(values: torch.Tensor) -> float:
    """Σx² in the same way."""
    wide = values.double().flatten()
    return float(wide @ wide)  # 20 times as fast as squares, which are written to memory first


def _ratio(part: pd.Series, whole: pd.Series) -> pd.Series:
    """`part` over `whole`; weights of zero have no size to compare with."""
    return part / whole.where(whole > 0)


def _ratio_of_norms(part: pd.Series, whole: pd.Series) -> pd.Series:
    return _ratio(part, whole) ** 0.5


ENTRIES = Part("entries", lambda change: change.weight.numel())
WEIGHT = Part("weight_squared", lambda change: _squares(change.factor))
DELTA = Part("delta_squared", lambda change: _squares(change.delta))
ERROR = Part("error_squared", lambda change: _squares(change.error))
UNCHANGED = Part("unchanged", lambda change: int(change.is_stored_as_before.count_nonzero()))
MOVED = Part("moved", lambda change: int(change.is_moved.count_nonzero()))
LOST = Part("lost", lambda change: int((change.is_moved & change.is_stored_as_before).count_nonzero()))
ASKED = Part("asked_squared", lambda change: _squares(change.asked))
TAKEN = Part("asked_lost", lambda change: _inner(change.asked - change.stored, change.asked))
LARGEST = Part("max_abs", lambda change: float(change.delta.abs().max()), over="max")

METRICS = [
    Metric(
        "relative_change",
        "relative change",
        "Size of the change over size of the weights that it changes: ‖Δ‖ / ‖W‖. Of a norm that multiplies by 1 + w,"
        " the size is that of 1 + w.",
        (DELTA, WEIGHT),
        _ratio_of_norms,
    ),
    Metric(
        "floor",
        "rounding floor",
        "What storing the result with few digits alters, in the same unit. A change below it is mostly lost.",
        (ERROR, WEIGHT),
        _ratio_of_norms,
    ),
    Metric(
        "floor_share",
        "floor ÷ change",
        "The rounding floor over the size of the change.",
        (ERROR, DELTA),
        _ratio_of_norms,
    ),
    Metric(
        "lost_to_rounding",
        "lost to rounding",
        "The part of the change asked for that the file does not hold, 1 − ⟨stored, asked⟩ / ‖asked‖². Of a merge,"
        " asked is what its method makes of the stages before anything is rounded; stored is how far the file is from"
        " the base rounded to the same dtype. Rounding that adds as much as it takes away loses nothing.",
        (TAKEN, ASKED),
        lambda taken, asked: _ratio(taken, asked).clip(lower=0),
    ),
    Metric(
        "unchanged",
        "entries unchanged",
        "Share of the numbers that the file holds as it would without the change, whether rounding left them so or what"
        " was asked for did, as a method that trims does.",
        (UNCHANGED, ENTRIES),
        _ratio,
    ),
    Metric(
        "rounded_away",
        "rounded away",
        "Share of the numbers that the change asked for moves and that are stored as if it had not.",
        (LOST, MOVED),
        _ratio,
    ),
    Metric(
        "max_abs",
        "largest change",
        "The largest change of a single number, max|Δ|.",
        (LARGEST,),
        lambda largest: largest,
        is_share=False,
    ),
]
PARTS = list(dict.fromkeys(part for metric in METRICS for part in metric.parts))
