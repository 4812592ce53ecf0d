"""What each stage and the merge changed, tensor by tensor, with one module in memory at a time.

Every ratio of norms is kept as its parts, so that a layer's or a model's number is exact and not a mean of
ratios. Inner products are summed in float64; they give cosines and survival with no second pass.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from analysis.changes.heads import measure_heads
from analysis.changes.measured import COLUMNS, CONFLICT, INTERFERENCE, MERGED, PAIRS, SPECTRUM, Matrix, Measured
from analysis.changes.spectra import effective_rank, singular_values
from analysis.changes.subspaces import Directions, Familiar, interference, overlap, strongest
from analysis.changes.tensors import chunks, distance, inner_products, norm, rounding
from stages.merging.merged import Merged
from stages.models.architecture import OUTSIDE
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
    tally = _Tally([*(stage.name for stage in stages), MERGED], set(exact.merge.weights))
    for path, parameters in exact.modules.items():
        adapted = [stage for stage in stages if path in stage.adapter.modules]
        factors = {stage.name: stage.adapter.factors(path) for stage in adapted}
        deltas = {stage.name: _delta(stage, path, factors[stage.name]) for stage in adapted}
        whole = exact.module(path)
        for parameter in parameters:
            found = {stage: delta[parameter] for stage, delta in deltas.items() if parameter in delta}
            own = {stage: delta for stage, delta in found.items() if bool(delta.any())}
            here, name = base.architecture.place(path), f"{path}.{parameter}"
            stored = base.stored(name), file.stored(name), whole[parameter]
            tally.add(_Tensor(*here, parameter, *stored, own, factors))
    return Measured(
        names=tally.names,
        rows=pd.DataFrame(tally.rows, columns=COLUMNS + SPECTRUM),
        conflicts=pd.DataFrame(tally.conflicts, columns=["layer", "stages", *CONFLICT, *INTERFERENCE]),
        pairs=pd.DataFrame(tally.pairs, columns=PAIRS),
        heads=measure_heads(stages, exact, file),
        grams=tally.grams,
        modules=base.architecture.kinds,
        layers=base.architecture.layers,
        untouched=len(tally.untouched),
        untouched_max=max(tally.untouched, default=0.0),
    )


def _delta(stage: VirtualCheckpoint, path: str, factors: Factors | None) -> Tensors:
    """What a stage changes in a module: the product of its factors, else the difference to its parent's weights."""
    return stage.delta(path) if factors is None else {"weight": factors[0] @ factors[1]}


@dataclass(frozen=True)
class _Tensor:
    """One tensor: as base and merged file store it, of the exact merge, and its deltas and their factors by stage."""

    layer: int
    module: str
    parameter: str
    stored: torch.Tensor
    file: torch.Tensor
    exact: torch.Tensor
    own: dict[str, torch.Tensor]
    factors: dict[str, Factors | None]


class _Tally:
    """What `measure` has seen so far."""

    def __init__(self, names: list[str], listed: set[str]) -> None:
        self.names, self.listed = names, listed
        self.rows: list[dict[str, object]] = []
        self.conflicts: list[dict[str, object]] = []
        self.pairs: list[tuple[object, ...]] = []
        self.grams: dict[int, Matrix] = {}
        self.untouched: list[float] = []

    def add(self, tensor: _Tensor) -> None:
        """Take in one tensor."""
        meeting = [stage for stage in tensor.own if stage in self.listed]
        if not meeting:
            self.untouched.append(distance(tensor.file, tensor.stored.to(tensor.file.dtype)))
        if not tensor.own:
            return
        weight = tensor.stored.float()
        deltas = {**tensor.own, **({MERGED: tensor.file.float() - weight} if meeting else {})}
        used: dict[str, Directions] = {}
        if weight.dim() == 2:
            used = {stage: strongest(delta, tensor.factors.get(stage)) for stage, delta in tensor.own.items()}
        self._compare(tensor, weight, deltas, used)
        self._relate(tensor, meeting, used)

    def _compare(
        self, tensor: _Tensor, weight: torch.Tensor, deltas: dict[str, torch.Tensor], used: dict[str, Directions]
    ) -> None:
        """Rows of all deltas, and their inner products."""
        here = [self.names.index(stage) for stage in deltas]
        gram = inner_products(list(deltas.values()))
        self.grams.setdefault(tensor.layer, np.zeros((len(self.names), len(self.names))))[np.ix_(here, here)] += gram
        size = norm(weight)
        added = {stage: found.left for stage, found in used.items()}
        if used:
            added[MERGED] = torch.cat(list(added.values()), 1)
        familiar = Familiar(weight) if used and tensor.layer != OUTSIDE else None
        for (stage, delta), square in zip(deltas.items(), np.diag(gram), strict=True):
            changed = tensor.exact if stage == MERGED else weight + delta
            file = tensor.file if stage == MERGED else changed.to(tensor.file.dtype)
            row = {"stage": stage, "layer": tensor.layer, "module": tensor.module, "parameter": tensor.parameter}
            row |= {"entries": weight.numel(), "weight": size, "delta": square**0.5}
            row |= rounding(weight, changed, file)
            row["max_abs"] = max(float(part.abs().max()) for (part,) in chunks(delta))
            if stage in used:
                row |= _spectrum(delta, tensor.factors.get(stage))
            if familiar:
                row["intruders"] = familiar.intruders(changed, added[stage])
            self.rows.append(row)

    def _relate(self, tensor: _Tensor, meeting: list[str], used: dict[str, Directions]) -> None:
        """Overlaps of every two stages, and the conflict of those that meet in the merge."""
        for (first, one), (second, other) in itertools.combinations(used.items(), 2):
            overlaps = *overlap(one.right, other.right), *overlap(one.left, other.left)
            self.pairs.append((tensor.layer, tensor.module, first, second, *overlaps))
        if len(meeting) > 1:
            found = sign_conflict([tensor.own[stage] for stage in meeting])
            if used:
                found |= dict(zip(INTERFERENCE, interference([used[stage] for stage in meeting]), strict=True))
            self.conflicts.append({"layer": tensor.layer, "stages": ", ".join(meeting), **found})


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
    for parts in chunks(*deltas):
        stacked = torch.stack(parts)
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


def _spectrum(delta: torch.Tensor, factors: Factors | None) -> dict[str, float]:
    values = singular_values(delta, factors)
    return {
        "spectral_norm": float(values[0]),
        "stable_rank": float(values.square().sum() / values[0].square()),
        "effective_rank": effective_rank(values),
        "directions": len(values),
    }
