"""Metrics of groups of tensors, from the rows that measuring leaves."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pandas as pd

from analysis.changes.measured import KEYS, MERGED, SPECTRUM, Matrix, Measured
from analysis.changes.metrics import METRICS, PARTS

FALSE_ALARM = 1e-3  # how often chance alone may raise one, over all comparisons of a kind
NO_STAGE = "(no stage)"  # whose change the rest is; no stage can be called so
NOISE = 1e-12  # a share that float64 leaves of 1 less the sum of others is none


def summarise(rows: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Metrics of each group of tensors, taken as one long vector.

    Args:
        rows: of `Measured`.
        by: columns that name a group, such as `["stage", "layer"]`.

    Returns:
        One row per group, with the columns of `by` and those of METRICS.
    """
    numbers = rows.astype({part.name: float for part in PARTS})  # a table without rows does not know its types
    groups = numbers.groupby(by, sort=False)
    totals = {part: groups[part.name].agg(part.over) for part in PARTS}
    values = {metric.name: metric.value(*(totals[part] for part in metric.parts)) for metric in METRICS}
    return pd.DataFrame(values).reset_index()


def tidy(rows: pd.DataFrame, heads: pd.DataFrame) -> pd.DataFrame:
    """One line for each number: stage, layer, module, parameter, metric, value and its rounding floor.

    Args:
        rows: of `Measured`.
        heads: from `analysis.changes.heads`; a head is the parameter `head 3` of the module `attention`.
    """
    table = summarise(rows, KEYS)
    named = heads.assign(module="attention", parameter="head " + heads["head"].astype(str))
    long = pd.concat(
        [
            table.melt(KEYS, [metric.name for metric in METRICS], "metric", "value").dropna(),
            rows.melt(KEYS, SPECTRUM, "metric", "value").dropna(),
            named.melt(KEYS, ["qk", "ov"], "metric", "value"),
        ],
        ignore_index=True,
    )
    floors = table[KEYS].assign(metric="relative_change", floor=table["floor"])
    return long.merge(floors, "left", [*KEYS, "metric"])


def survival(gram: Matrix, names: list[str], merged_stages: list[str]) -> pd.DataFrame:
    """How much of each merged stage's delta is in the merged delta, and whose change that one is.

    The merged delta is written as Σ cᵢΔᵢ + rest by least squares, c = G⁻¹⟨Δᵢ,Δ_M⟩. A survival of 1 is the whole
    delta. The shares cᵢ⟨Δᵢ,Δ_M⟩/‖Δ_M‖² and the share of the rest, which is NO_STAGE's, sum to 1; a merge that changes
    nothing has none.

    Args:
        gram: inner products, of a layer or summed over layers.
        names: what its rows are, the merged model last.
        merged_stages: those that the merge put in.

    Returns:
        Columns stage, survival and share; only stages that change something here, then NO_STAGE.
    """
    present = [i for i, name in enumerate(names) if name in merged_stages and gram[i, i] > 0]
    onto, total = gram[present, -1], gram[-1, -1]
    coefficients = inverse(gram[np.ix_(present, present)]) @ onto
    shares = coefficients * onto / (total or np.nan)
    rest = 1 - float(shares.sum()) if total else np.nan
    rest = 0.0 if rest < NOISE else rest
    return pd.DataFrame(
        {
            "stage": [*(names[i] for i in present), NO_STAGE],
            "survival": [*coefficients, np.nan],
            "share": [*shares, rest],
        }
    )


def inverse(gram: Matrix) -> Matrix:
    """G⁻¹ of inner products; changes of one direction have no unique answer, and share it by the pseudo-inverse."""
    return np.linalg.pinv(gram, hermitian=True)


def frozen_check(measured: Measured, declared: dict[str, list[int]], has_file: bool) -> pd.DataFrame:
    """Whether anything changed that should not have.

    A stage's weights are its parent's plus its adapter, so outside the modules that the adapter names its
    delta is zero by construction: what is checked is that those modules lie within the declared layers. The
    merged model is a file of its own: each tensor that no merged stage changes is read and compared.

    Args:
        measured: from `measure`.
        declared: by stage, the layers that it may change; an imported adapter declares none and is not checked.
        has_file: whether the merge wrote a model.

    Returns:
        Columns checkpoint, checked (what was compared, in words) and max_abs (which must be 0).
    """
    checks = []
    for stage, layers in declared.items():
        rows = measured.rows[measured.rows["stage"] == stage]
        outside = rows[~rows["layer"].isin(layers)]
        text = "changes of the adapter outside the layers that the stage declares"
        checks.append((stage, text, float(outside["max_abs"].max()) if len(outside) else 0.0))
    if has_file and measured.untouched:
        text = f"stored values of the {measured.untouched} tensors that no merged stage changes, against the base's"
        checks.append((MERGED, text, measured.untouched_max))
    return pd.DataFrame(checks, columns=["checkpoint", "checked", "max_abs"])


def cosines(gram: Matrix) -> Matrix:
    """⟨Δᵢ,Δⱼ⟩/‖Δᵢ‖‖Δⱼ‖ [n, n]; not a number where a delta is zero."""
    norms = np.sqrt(np.diag(gram))
    with np.errstate(invalid="ignore", divide="ignore"):
        return gram / np.outer(norms, norms)


def cosine_by_chance(rows: pd.DataFrame, first: str, second: str) -> float:
    """Standard deviation of the cosine of two unrelated changes that are as large, tensor by tensor, as these two.

    In a tensor of n entries unrelated changes have an inner product of variance ‖Δᵢ‖²‖Δⱼ‖²/n.

    Args:
        rows: of `Measured`.
        first: a checkpoint that changes something.
        second: another one.
    """
    one, other = (rows[rows["stage"] == name] for name in (first, second))
    both = one.merge(other, on=KEYS[1:], suffixes=("", "_other"))
    variance = (both["delta_squared"] * both["delta_squared_other"] / both["entries"]).sum()
    return float((variance / (one["delta_squared"].sum() * other["delta_squared"].sum())) ** 0.5)


def significant(comparisons: int) -> float:
    """Standard deviations from which a number is more than chance: one of so many is beyond it by chance in a thousand.

    Of a normal number, and for all comparisons together (Bonferroni).
    """
    return NormalDist().inv_cdf(1 - FALSE_ALARM / comparisons)
