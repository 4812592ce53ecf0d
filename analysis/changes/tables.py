"""Metrics of groups of tensors, from the rows that measuring leaves."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.changes.measured import MERGED, SPECTRUM, Matrix, Measured


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
        heads: from `analysis.changes.heads`; a head is the parameter `head 3` of the module `attention`.
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


def cosines(gram: Matrix) -> Matrix:
    """⟨Δᵢ,Δⱼ⟩/‖Δᵢ‖‖Δⱼ‖ [n, n]; not a number where a delta is zero."""
    norms = np.sqrt(np.diag(gram))
    with np.errstate(invalid="ignore", divide="ignore"):
        return gram / np.outer(norms, norms)
