"""What each stage and the merge changed, tensor by tensor, with one module in memory at a time.

Every ratio of norms is kept as its parts, so that a layer's or a model's number is exact and not a mean of
ratios. Inner products are summed in float64; they give cosines and survival with no second pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from analysis.spectra import effective_rank, singular_values
from analysis.subspaces import Directions, Familiar, interference, overlap, strongest
from stages.layers import OUTSIDE, layer_stack, place
from stages.merging.merged import Merged
from stages.weights.adapter import Factors, Tensors
from stages.weights.checkpoint import Checkpoint, VirtualCheckpoint

MERGED = "merged"
CHUNK = 1 << 18  # entries that are looked at together: few enough to stay in the processor's cache

COLUMNS = ["stage", "layer", "module", "parameter", "entries", "weight", "delta", "error", "unchanged", "max_abs"]
SPECTRUM = ["spectral_norm", "stable_rank", "effective_rank", "directions", "intruders"]
CONFLICT = ["entries", "disagreeing", "size", "summed", "summed_by_chance"]
INTERFERENCE = ["interference", "interference_by_chance"]
PAIRS = ["layer", "module", "first", "second", "reads", "reads_by_chance", "writes", "writes_by_chance"]

Matrix = np.ndarray


@dataclass(frozen=True)
class Measured:
    """Everything the report needs to know about weights.

    Attributes:
        names: the stages in the order of params.yaml, then `merged`.
        rows: one per checkpoint and tensor that it changes: stage, layer, module, parameter, entries, the
            Frobenius norms `weight` ‖W‖, `delta` ‖Δ‖ and `error` ‖round(W+Δ)−(W+Δ)‖, `unchanged` (entries
            whose bits the file's dtype leaves as they were) and `max_abs` max|Δ|; for the matrices of stages also
            `spectral_norm` σ₁, `stable_rank` ‖Δ‖²/σ₁², `effective_rank`, and of how many `directions` at most; for
            matrices of layers, the merge's too, how many `intruders` the changed weights have.
        conflicts: one row per tensor that several merged stages change: layer, stages (their names), what
            `sign_conflict` returns, and of matrices what `interference` does.
        pairs: one row per matrix and two stages that change it: layer, module, their names, and how far the subspaces
            that they read and write overlap, beside chance.
        grams: by layer, inner products of all pairs of `names`, float64 [names, names].
        modules: kinds of modules in the order of the model, such as `self_attn.q_proj`.
        layers: how many layers the model has.
        untouched: how many tensors no merged stage changes.
        untouched_max: max|merged − base| over them, the base rounded to the merged file's dtype.
    """

    names: list[str]
    rows: pd.DataFrame
    conflicts: pd.DataFrame
    pairs: pd.DataFrame
    grams: dict[int, Matrix]
    modules: list[str]
    layers: int
    untouched: int
    untouched_max: float


def measure(stages: list[VirtualCheckpoint], exact: Merged, file: Checkpoint | Merged) -> Measured:
    """Compare every tensor of the stages and of the merged file with the base.

    Args:
        stages: every stage, merged or not.
        exact: the merge in float32, computed once more, for that is what the file rounds.
        file: what the merge wrote.
    """
    base = exact.base
    stack = layer_stack(base.skeleton)
    tally = _Tally([*(stage.name for stage in stages), MERGED], set(exact.merge.weights))
    for path, parameters in exact.modules.items():
        adapted = [stage for stage in stages if path in stage.adapter.modules]
        factors = {stage.name: stage.adapter.factors(path) for stage in adapted}
        deltas = {stage.name: _delta(stage, path, factors[stage.name]) for stage in adapted}
        whole = exact.module(path)
        for parameter in parameters:
            found = {stage: delta[parameter] for stage, delta in deltas.items() if parameter in delta}
            own = {stage: delta for stage, delta in found.items() if bool(delta.any())}
            here, name = place(path, stack), f"{path}.{parameter}"
            stored = base.stored(name), file.stored(name), whole[parameter]
            tally.add(_Tensor(*here, parameter, *stored, own, factors))
    return Measured(
        names=tally.names,
        rows=pd.DataFrame(tally.rows, columns=COLUMNS + SPECTRUM),
        conflicts=pd.DataFrame(tally.conflicts, columns=["layer", "stages", *CONFLICT, *INTERFERENCE]),
        pairs=pd.DataFrame(tally.pairs, columns=PAIRS),
        grams=tally.grams,
        modules=module_kinds(base, stack),
        layers=base.skeleton.config.num_hidden_layers,
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
            self.untouched.append(_distance(tensor.file, tensor.stored.to(tensor.file.dtype)))
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
            row["max_abs"] = max(float(part.abs().max()) for (part,) in _chunks(delta))
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


def inner_products(deltas: list[torch.Tensor]) -> Matrix:
    """⟨Δᵢ,Δⱼ⟩ of all pairs, float64 [deltas, deltas]; only a chunk of the deltas is float64 at one time."""
    total = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
    for parts in _chunks(*deltas):
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
    for before, exact, kept in _chunks(weight, changed, file):
        error += float((kept.float() - exact).square().sum())
        unchanged += int(torch.count_nonzero(kept == before.to(kept.dtype)))
    return {"error": error**0.5, "unchanged": unchanged}


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
    for parts in _chunks(*deltas):
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


def summarise(rows: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Metrics of each group of tensors, taken as one long vector.

    Args:
        rows: of `Measured`.
        by: columns that name a group, such as `["stage", "layer"]`.

    Returns:
        One row per group with relative_change ‖Δ‖/‖W‖, floor (what rounding to the file's dtype alters,
        over ‖W‖), floor_share (the same over ‖Δ‖), unchanged (share of entries whose bits stay as they
        were) and max_abs max|Δ|.
    """
    squares = rows.assign(**{name: rows[name].astype(float) ** 2 for name in ("weight", "delta", "error")})
    totals = squares.groupby(by, sort=False)[["weight", "delta", "error", "entries", "unchanged"]].sum()
    weight, delta, error = (totals[name] ** 0.5 for name in ("weight", "delta", "error"))
    return pd.DataFrame(
        {
            "relative_change": delta / weight,
            "floor": error / weight,
            "floor_share": error / delta,
            "unchanged": totals["unchanged"] / totals["entries"],
            "max_abs": rows.groupby(by, sort=False)["max_abs"].max(),
        }
    ).reset_index()


def tidy(rows: pd.DataFrame, heads: pd.DataFrame) -> pd.DataFrame:
    """One line for each number: stage, layer, module, parameter, metric, value and its rounding floor.

    Args:
        rows: of `Measured`.
        heads: from `analysis.heads`; a head is the parameter `head 3` of the module `attention`.
    """
    keys = ["stage", "layer", "module", "parameter"]
    table = summarise(rows, keys)
    named = heads.assign(module="attention", parameter="head " + heads["head"].astype(str))
    long = pd.concat(
        [
            table.melt(keys, ["relative_change", "unchanged", "max_abs"], "metric", "value"),
            rows.melt(keys, SPECTRUM, "metric", "value").dropna(),
            named.melt(keys, ["qk", "ov"], "metric", "value"),
        ],
        ignore_index=True,
    )
    floors = table[keys].assign(metric="relative_change", floor=table["floor"])
    return long.merge(floors, "left", [*keys, "metric"])


def cosines(gram: Matrix) -> Matrix:
    """⟨Δᵢ,Δⱼ⟩/‖Δᵢ‖‖Δⱼ‖ [n, n]; not a number where a delta is zero."""
    norms = np.sqrt(np.diag(gram))
    with np.errstate(invalid="ignore", divide="ignore"):
        return gram / np.outer(norms, norms)


def survival(gram: Matrix, names: list[str], merged_stages: list[str]) -> pd.DataFrame:
    """How much of each merged stage's delta is in the merged delta, and whose change that one is.

    The merged delta is written as Σ cᵢΔᵢ + rest by least squares, c = G⁻¹⟨Δᵢ,Δ_M⟩. A survival of 1 is the whole
    delta. The shares cᵢ⟨Δᵢ,Δ_M⟩/‖Δ_M‖² and the share of the rest, called `unexplained`, sum to 1.

    Args:
        gram: inner products, of a layer or summed over layers.
        names: what its rows are, the merged model last.
        merged_stages: those that the merge put in.

    Returns:
        Columns stage, survival and share; only stages that change something here, then `unexplained`.
    """
    present = [i for i, name in enumerate(names) if name in merged_stages and gram[i, i] > 0]
    onto, total = gram[present, -1], gram[-1, -1]
    # Stages of one direction have no unique answer; the pseudo-inverse shares it among them.
    kept = np.linalg.pinv(gram[np.ix_(present, present)], hermitian=True) @ onto
    shares = kept * onto / total if total else np.zeros(len(present))
    rest = max(0.0, 1 - float(shares.sum())) if total else 0.0
    return pd.DataFrame(
        {
            "stage": [*(names[i] for i in present), "unexplained"],
            "survival": [*kept, np.nan],
            "share": [*shares, rest],
        }
    )


def frozen_check(measured: Measured, declared: dict[str, list[int]]) -> pd.DataFrame:
    """Whether anything changed that should not have.

    A stage's weights are its parent's plus its adapter, so outside the modules that the adapter names its
    delta is zero by construction: what is checked is that those modules lie within the declared layers. The
    merged model is a file of its own: each tensor that no merged stage changes is read and compared.

    Args:
        measured: from `measure`.
        declared: by stage, the layers that its stage.json tells.

    Returns:
        Columns checkpoint, checked (what was compared, in words) and max_abs (which must be 0).
    """
    checks = []
    for stage, layers in declared.items():
        rows = measured.rows[measured.rows["stage"] == stage]
        outside = rows[~rows["layer"].isin(layers)]
        text = "changes of the adapter outside the layers that the stage declares"
        checks.append((stage, text, float(outside["max_abs"].max()) if len(outside) else 0.0))
    text = f"stored values of the {measured.untouched} tensors that no merged stage changes, against the base's"
    checks.append((MERGED, text, measured.untouched_max))
    return pd.DataFrame(checks, columns=["checkpoint", "checked", "max_abs"])


def _spectrum(delta: torch.Tensor, factors: Factors | None) -> dict[str, float]:
    values = singular_values(delta, factors)
    return {
        "spectral_norm": float(values[0]),
        "stable_rank": float(values.square().sum() / values[0].square()),
        "effective_rank": effective_rank(values),
        "directions": len(values),
    }


def _distance(first: torch.Tensor, second: torch.Tensor) -> float:
    return 0.0 if torch.equal(first, second) else float((first.double() - second.double()).abs().max())


def norm(values: torch.Tensor) -> float:
    """Frobenius norm, summed in float64."""
    # float32 would lose digits over millions of entries
    return sum(float(part.double().square().sum()) for (part,) in _chunks(values)) ** 0.5


def _chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same CHUNK entries of tensors of one shape, and then the next."""
    return zip(*(tensor.flatten().split(CHUNK) for tensor in tensors), strict=True)


def module_kinds(base: Checkpoint, stack: str) -> list[str]:
    """Kinds of modules that the layers of `base` hold, such as `self_attn.q_proj`, in the order of the model."""
    stored = {kind for path in base.modules for layer, kind in [place(path, stack)] if layer != OUTSIDE}
    ordered = [place(path, stack)[1] for path, _ in base.skeleton.named_modules()]
    return [kind for kind in dict.fromkeys(ordered) if kind in stored]
