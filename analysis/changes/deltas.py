"""What each stage and the merge changed, tensor by tensor, with one module in memory at a time.

Every ratio of norms is kept as its parts, so that a layer's or a model's number is exact and not a mean of
ratios. Inner products are summed in float64; they give cosines and survival with no second pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import pandas as pd
import torch

from analysis.changes.heads import measure_heads
from analysis.changes.measured import COLUMNS, CONFLICT, INTERFERENCE, MERGED, PAIRS, SPECTRUM, Measured
from analysis.changes.spectra import spectrum
from analysis.changes.subspaces import BaseDirections, Directions, interference, overlap, overlap_spread, strongest
from analysis.changes.tally import Tally, Where
from analysis.changes.tensors import TensorChange, chunks, distance, has_unit_gain
from stages.merging.merged import Merged
from stages.models.architecture import OUTSIDE
from stages.models.names import full_name
from stages.weights.adapter import Factors, Tensors
from stages.weights.checkpoint import Checkpoint, VirtualCheckpoint


def measure(stages: list[VirtualCheckpoint], exact: Merged, file: Checkpoint | Merged) -> Measured:
    """Compare every tensor of the stages and of the merged file with the base.

    Args:
        stages: every stage, merged or not.
        exact: the merge in float32, computed once more, for that is what the file rounds.
        file: what the merge wrote.
    """
    base = exact.base
    measuring = _Measuring([*(stage.name for stage in stages), MERGED], set(exact.merge.weights))
    for path, parameters in exact.modules.items():
        adapted = [stage for stage in stages if path in stage.adapter.modules]
        factors = {stage.name: stage.adapter.factors(path) for stage in adapted}
        deltas = {stage.name: delta_of(stage, path, factors[stage.name]) for stage in adapted}
        merged = exact.module(path)
        for parameter in parameters:
            own = {stage: delta[parameter] for stage, delta in deltas.items() if parameter in delta}
            name = full_name(path, parameter)
            tensor = _Tensor(
                where=Where(*base.architecture.place(path), parameter),
                unit_gain=has_unit_gain(base.architecture, path, parameter),
                stored=base.stored(name),
                exact=merged[parameter],
                file=file.stored(name),
                deltas={stage: delta for stage, delta in own.items() if bool(delta.any())},
                factors={stage.name: stage.adapter.factors(path, parameter) for stage in adapted},
                rounded=partial(exact.rounded, name),
                is_stack=base.architecture.is_stack(path),
            )
            measuring.add(tensor)
    return Measured(
        names=measuring.tally.names,
        rows=pd.DataFrame(measuring.tally.rows, columns=COLUMNS + SPECTRUM),
        conflicts=pd.DataFrame(measuring.conflicts, columns=["layer", "stages", *CONFLICT, *INTERFERENCE]),
        pairs=pd.DataFrame(measuring.pairs, columns=PAIRS),
        heads=measure_heads(stages, exact, file),
        grams=measuring.tally.grams,
        modules=base.architecture.kinds,
        layers=base.architecture.layers,
        dtype=exact.merge.dtype,
        untouched=len(measuring.untouched),
        untouched_max=max(measuring.untouched, default=0.0),
    )


def delta_of(stage: VirtualCheckpoint, path: str, factors: Factors | None) -> Tensors:
    """What a stage changes in a module: the product of its factors, else the difference to its parent's weights."""
    weight = {} if factors is None else {"weight": factors[0] @ factors[1]}
    return weight if weight and not stage.adapter.has_bias(path) else stage.delta(path) | weight


@dataclass(frozen=True)
class _Tensor:
    """One tensor, and what the checkpoints make of it.

    Attributes:
        where: its layer, module and parameter.
        unit_gain: whether it is the weight of a norm that multiplies by 1 + weight.
        stored: as the base's file has it.
        exact: of the merge, in float32.
        file: as the merged file has it.
        deltas: of the stages that change it, float32.
        factors: low-rank factors of the deltas, None where one has none.
        rounded: its values in float32 as the merge would store them.
        is_stack: whether it is of several experts, a matrix or a bias of each.
    """

    where: Where
    unit_gain: bool
    stored: torch.Tensor
    exact: torch.Tensor
    file: torch.Tensor
    deltas: dict[str, torch.Tensor]
    factors: dict[str, Factors | None]
    rounded: Callable[[torch.Tensor], torch.Tensor]
    is_stack: bool

    @cached_property
    def weight(self) -> torch.Tensor:
        """The base's, in float32."""
        return self.stored.float()

    def change(self, name: str, delta: torch.Tensor) -> TensorChange:
        """What a checkpoint of that name changes: a stage, as if it were stored by itself, or the merged file."""
        exact = self.exact if name == MERGED else self.weight + delta
        file = self.file if name == MERGED else self.rounded(exact)
        return TensorChange(self.weight, delta, exact, file, self.unit_gain)


class _Measuring:
    """What `measure` has gone through so far.

    Args:
        names: of the checkpoints.
        merged: names of the stages that are merged.
    """

    def __init__(self, names: list[str], merged: set[str]) -> None:
        self.tally, self.merged = Tally(names), merged
        self.conflicts: list[dict[str, object]] = []
        self.pairs: list[tuple[object, ...]] = []
        self.untouched: list[float] = []

    def add(self, tensor: _Tensor) -> None:
        """Take in one tensor."""
        merged = [stage for stage in tensor.deltas if stage in self.merged]
        if not merged:
            self.untouched.append(distance(tensor.file, tensor.stored.to(tensor.file.dtype)))
        if not tensor.deltas:
            return
        directions: dict[str, Directions] = {}
        if tensor.stored.dim() == 2 and not tensor.is_stack:
            directions = {stage: strongest(d, tensor.factors.get(stage)) for stage, d in tensor.deltas.items()}
        self._compare(tensor, directions, with_merged=bool(merged))
        self._relate(tensor, merged, directions)

    def _compare(self, tensor: _Tensor, directions: dict[str, Directions], with_merged: bool) -> None:
        """Rows of all changes, and their inner products."""
        deltas = dict(tensor.deltas)
        if with_merged:
            deltas[MERGED] = tensor.file.float() - tensor.weight
        self.tally.add_products(tensor.where.layer, deltas)
        written = {stage: each.left for stage, each in directions.items()}
        if directions:
            written[MERGED] = torch.cat(list(written.values()), 1)
        base = BaseDirections(tensor.weight) if directions and tensor.where.layer != OUTSIDE else None
        for name, delta in deltas.items():
            change = tensor.change(name, delta)
            row = self.tally.add_row(name, tensor.where, change)
            if name in directions or (tensor.is_stack and delta.dim() == 3 and name != MERGED):
                row |= spectrum(delta, tensor.factors.get(name))
            if base:
                row["intruders"] = base.intruders(change.exact, written[name])

    def _relate(self, tensor: _Tensor, merged: list[str], directions: dict[str, Directions]) -> None:
        """Overlaps of every two stages, and the conflict of those that meet in the merge."""
        for (first, one), (second, other) in itertools.combinations(directions.items(), 2):
            row = [tensor.where.layer, tensor.where.module, first, second]
            for side, beside in ((one.right, other.right), (one.left, other.left)):
                row += [*overlap(side, beside), overlap_spread(side, beside)]
            self.pairs.append(tuple(row))
        if len(merged) > 1:
            conflict = sign_conflict([tensor.deltas[stage] for stage in merged])
            if directions:
                values = interference([directions[stage] for stage in merged])
                conflict |= dict(zip(INTERFERENCE, values, strict=True))
            self.conflicts.append({"layer": tensor.where.layer, "stages": ", ".join(merged), **conflict})


def sign_conflict(deltas: list[torch.Tensor]) -> dict[str, float]:
    """How far deltas of one tensor pull its entries apart, as sums that can be added over tensors.

    Unrelated deltas disagree in sign on 1 − 2^(1−T) of the entries, and so raw disagreement says nothing by itself.

    Returns:
        entries: those that every delta changes, and of them the `disagreeing`, whose signs are not all the same.
        size: Σ|Δ|₁ over the deltas, and |ΣΔ|₁, what is left of it when they are `summed`.
        summed_by_chance: the latter for unrelated normal deltas of the same sizes, whose squares add.
    """
    sizes, summed = torch.zeros(len(deltas), dtype=torch.float64), 0.0
    entries = agreeing = 0
    for pieces in chunks(*deltas):
        stacked = torch.stack(pieces)
        entries += int(torch.count_nonzero((stacked != 0).all(0)))
        agreeing += int(torch.count_nonzero(stacked.sign().sum(0).abs() == len(deltas)))
        sizes += stacked.abs().sum(1)
        summed += float(stacked.sum(0).abs().sum())
    return {
        "entries": entries,
        "disagreeing": entries - agreeing,
        "size": float(sizes.sum()),
        "summed": summed,
        "summed_by_chance": float(sizes.square().sum().sqrt()),
    }
