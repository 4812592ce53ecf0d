"""What the changes do to single attention heads: where a head looks (QK) and what it copies (OV).

A head's scores are xᵀ Q K x and what it writes is O V x (Elhage et al. 2021): two matrices [width, width] of low rank,
which are never made, for products of small Gram matrices give their norms. Rotary position embeddings lie between Q
and K, so that QK is the circuit of a token and itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pandas as pd
import torch

from analysis.changes.measured import MERGED
from stages.merging.merged import Merged
from stages.models.architecture import OUTSIDE, Architecture
from stages.weights.checkpoint import Checkpoint, VirtualCheckpoint

if TYPE_CHECKING:
    from stages.models.loading import Weights

PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")
COLUMNS = ["stage", "layer", "head", "qk", "ov"]

Tensor = torch.Tensor
Circuit = tuple[Tensor, Tensor]  # L [heads, d, width] and R [key heads, d, width] of M = LᵀR, which query heads share


def measure_heads(stages: list[VirtualCheckpoint], exact: Merged, file: Checkpoint | Merged) -> pd.DataFrame:
    """Relative change of both circuits of every head, of each stage to its parent and of the merged file to the base.

    A model whose queries and keys are normalised is blind to their scale, so there QK is how far it turned at the best
    scale, √(1−cos²). Models without separate q, k, v and o matrices, one query per head, have no rows.

    Returns:
        Columns stage, layer, head, qk, ov; only layers in which one of these matrices is changed.
    """
    base, rows = exact.base, []
    before: dict[str, Weights] = {**{stage.name: stage.parent for stage in stages}, MERGED: base}
    after: dict[str, Weights] = {**{stage.name: stage for stage in stages}, MERGED: file}
    adapted = {stage.name: set(stage.adapter.modules) for stage in stages} | {MERGED: exact.adapted()}
    for layer, paths in _layers(base).items():
        parent = None
        for name in after:
            if not adapted[name] & {paths[part] for part in PARTS}:
                continue
            if parent is not before[name]:  # stages side by side, and the merged file, have the same one
                parent = before[name]
                old = _circuits(parent, paths, base.architecture)
            new = _circuits(after[name], paths, base.architecture)
            (looks, turned), (copies, _) = (circuit_change(*pair) for pair in zip(old, new, strict=True))
            changes = torch.stack([turned if "q_norm" in paths else looks, copies], 1).tolist()
            rows += [(name, layer, head, *change) for head, change in enumerate(changes)]
    return pd.DataFrame(rows, columns=COLUMNS)


def _layers(base: Checkpoint) -> dict[int, dict[str, str]]:
    """Paths of the modules in each layer with attention, by the last part of their names."""
    layers: dict[int, dict[str, str]] = {}
    for path in base.architecture.modules:
        layer, kind = base.architecture.place(path)
        is_of_queries = (
            any(part.startswith("q") for part in kind.split(".")) and base.architecture.modules[path].group == "norms"
        )
        layers.setdefault(layer, {})["q_norm" if is_of_queries else kind.rpartition(".")[2]] = path
    layers.pop(OUTSIDE, None)  # where other parts of a model have heads too
    return {layer: paths for layer, paths in layers.items() if _are_heads(paths, base.architecture)}


def _are_heads(paths: dict[str, str], architecture: Architecture) -> bool:
    """Whether the heads have one query each, as wide as what they write: Qwen3.5's q_proj has a gate beside it."""
    if not paths.keys() >= set(PARTS):
        return False
    q, o = (architecture.modules[paths[part]].parameters["weight"] for part in ("q_proj", "o_proj"))
    return q[0] == o[1]


def _circuits(model: Weights, paths: dict[str, str], architecture: Architecture) -> tuple[Circuit, Circuit]:
    """QK and OV of all heads of a layer."""
    q, k, v, o = (model.module(paths[part])["weight"] for part in PARTS)
    size = len(q) // architecture.heads[paths["q_proj"]]
    q, k, v, o = (each.unflatten(0, (-1, size)) for each in (q, k, v, o.T))
    return (q, k), (o, v)


def circuit_change(before: Circuit, after: Circuit) -> tuple[Tensor, Tensor]:
    """‖D‖/‖M‖, D = M'−M, and √(1−cos²) of M and M', by head; float64 [heads].

    From Gram matrices of the factors and of their changes, D = δLᵀR' + LᵀδR: a difference of the norms of M and M'
    would lose all digits of a small change.
    """
    left, right = (_grams(old, new) for old, new in zip(before, after, strict=True))
    right = _Grams(*(each.repeat_interleave(len(left.old) // len(right.old), 0) for each in right))
    new_right = right.old + right.mixed + right.mixed.mT + right.change  # R'R'ᵀ
    size = (left.old * right.old).sum((1, 2))  # ‖M‖²
    along = (left.mixed * (right.old + right.mixed)).sum((1, 2)) + (left.old * right.mixed).sum((1, 2))  # ⟨M, D⟩
    both = 2 * left.mixed.mT * (right.mixed + right.change)
    moved = (left.change * new_right + both + left.old * right.change).sum((1, 2))  # ‖D‖²
    turned = (size * moved - along.square()) / (size * (size + 2 * along + moved))
    return (moved.clamp(min=0) / size).sqrt(), turned.clamp(min=0).sqrt()


class _Grams(NamedTuple):
    """Inner products of the rows of one factor X and of its change δX; float64 [heads, d, d].

    Attributes:
        old: XXᵀ.
        mixed: XδXᵀ.
        change: δXδXᵀ.
    """

    old: Tensor
    mixed: Tensor
    change: Tensor


def _grams(before: Tensor, after: Tensor) -> _Grams:
    """Those of one factor [heads, d, width] before and after."""
    change = after - before
    products = before @ before.mT, before @ change.mT, change @ change.mT
    return _Grams(*(product.double() for product in products))
