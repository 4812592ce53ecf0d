"""What the changes do to single attention heads: where a head looks (QK) and what it copies (OV).

A head's scores are xᵀ Q K x and what it writes is O V x (Elhage et al. 2021): two matrices [width, width] of low rank,
which are never made, for products of small Gram matrices give their norms. Rotary position embeddings lie between Q
and K, so that QK is the circuit of a token and itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import torch

from analysis.changes.measured import MERGED
from stages.merging.merged import Merged
from stages.models.architecture import Architecture
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
    scale, √(1−cos²). Models without separate q, k, v and o matrices have no rows.

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
            (looks, turned), (copies, _) = (_change(*pair) for pair in zip(old, new, strict=True))
            changes = torch.stack([turned if "q_norm" in paths else looks, copies], 1).tolist()
            rows += [(name, layer, head, *change) for head, change in enumerate(changes)]
    return pd.DataFrame(rows, columns=COLUMNS)


def _layers(base: Checkpoint) -> dict[int, dict[str, str]]:
    """Paths of the modules in each layer with attention, by the last part of their names."""
    found: dict[int, dict[str, str]] = {}
    for path in base.modules:
        layer, kind = base.architecture.place(path)
        found.setdefault(layer, {})[kind.rpartition(".")[2]] = path
    return {layer: paths for layer, paths in found.items() if paths.keys() >= set(PARTS)}


def _circuits(model: Weights, paths: dict[str, str], architecture: Architecture) -> tuple[Circuit, Circuit]:
    """QK and OV of all heads of a layer."""
    q, k, v, o = (model.module(paths[part])["weight"] for part in PARTS)
    size = len(q) // (architecture.heads or 1)
    q, k, v, o = (each.unflatten(0, (-1, size)) for each in (q, k, v, o.T))
    return (q, k), (o, v)


def _change(before: Circuit, after: Circuit) -> tuple[Tensor, Tensor]:
    """‖D‖/‖M‖, D = M'−M, and √(1−cos²) of M and M', by head.

    From Gram matrices [d, d] of the factors and of their changes, D = δLᵀR' + LᵀδR: a difference of the norms of M and
    M' would lose all digits of a small change.
    """
    (a, b, c), (e, f, g) = (_grams(old, new) for old, new in zip(before, after, strict=True))
    shared = len(a) // len(e)  # query heads to one of keys and values
    e, f, g = (each.repeat_interleave(shared, 0) for each in (e, f, g))
    size = (a * e).sum((1, 2))
    along = (b * (e + f)).sum((1, 2)) + (a * f).sum((1, 2))  # ⟨M, D⟩
    moved = (c * (e + f + f.mT + g) + 2 * b.mT * (f + g) + a * g).sum((1, 2))  # ‖D‖²
    turned = (size * moved - along.square()) / (size * (size + 2 * along + moved))
    return (moved.clamp(min=0) / size).sqrt(), turned.clamp(min=0).sqrt()


def _grams(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """XXᵀ, XδXᵀ and δXδXᵀ of one factor X [heads, d, width] and its change δX; float64 [heads, d, d]."""
    change = after - before
    x, y = before.mT, change.mT
    return (before @ x).double(), (before @ y).double(), (change @ y).double()
