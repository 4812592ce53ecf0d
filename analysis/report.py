"""The report of what the training changed, in one HTML file: `python -m analysis.report`.

Reads params.yaml and what the other stages left in reports/, and no weight of any model. Writes reports/report.html,
report.md (the same in short, for a pull request), lineage.json (its log of actions), evaluation.svg and layers.svg (two
of its pictures), deltas.parquet (every number about weights), layers.json (for `dvc plots`) and metrics.json (for `dvc
metrics`). No times and no chance: a second run writes the same bytes.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from analysis.changes.tables import summarise, survival, tidy
from analysis.telling.facts import Facts, gather
from analysis.telling.figures import (
    ablation_map,
    behaviour_lines,
    cosine_maps,
    drift_lines,
    evaluation_matrix,
    floor_lines,
    head_maps,
    heat_maps,
    loss_curves,
    whose_change,
)
from analysis.telling.page import contents, render
from analysis.telling.words import label
from stages.errors import run
from stages.files import REPORTS, write_json, write_text
from stages.project.params import load_params


def main() -> None:
    """Write every file of the report."""
    write(gather(load_params()))


def write(facts: Facts) -> None:
    """Write every file of the report."""
    pictures = draw(facts)
    for name in ("evaluation", "layers"):
        write_text(REPORTS / f"{name}.svg", pictures[name])
    write_json(REPORTS / "layers.json", layer_rows(facts))
    tidy(facts.measured.rows, facts.measured.heads).to_parquet(REPORTS / "deltas.parquet", index=False)
    write_json(REPORTS / "metrics.json", metrics(facts))
    told = contents(facts, pictures)
    write_json(REPORTS / "lineage.json", told["log"])
    for template in ("report.md", "report.html"):
        write_text(REPORTS / template, render(template, told))


def draw(facts: Facts) -> dict[str, str]:
    """All pictures, as SVG by name."""
    measured = facts.measured
    by_module = summarise(measured.rows[measured.rows["layer"] >= 0], ["stage", "layer", "module"])
    by_layer = summarise(measured.rows[measured.rows["layer"] >= 0], ["stage", "layer"])
    labels = {name: label(facts, name) for name in facts.matrix}
    titles = [f"{name} · {labels[name]}" for name in measured.names]
    return {
        "evaluation": evaluation_matrix(facts.matrix, labels, facts.settings.skills, facts.changed),
        "layers": heat_maps(by_module, measured.names, titles, measured.modules, measured.layers),
        "floor": floor_lines(by_layer[by_layer["stage"] == "merged"], measured.layers),
        "whose": whose_change(layer_shares(facts), list(facts.settings.stages), measured.layers),
        "cosines": cosine_maps(
            facts.gram, measured.grams, measured.names, measured.layers, paired=len(measured.names) - 1
        ),
        "drift": drift_lines(facts.probe, measured.layers),
        "behaviour": behaviour_lines(facts.probe, measured.layers),
        "heads": head_maps(
            facts.measured.heads[facts.measured.heads["stage"] == "merged"],
            facts.probe["checkpoints"]["merged"]["attention"]["divergence"],
        ),
        "ablation": ablation_map(ablations(facts), facts.settings.skills),
        "curves": loss_curves({name: curve for name, curve in facts.curves.items() if curve}),
    }


def ablations(facts: Facts) -> list[dict[str, Any]]:
    """What taking layers away did, of every stage that has some."""
    return [row for name in facts.settings.stages for row in facts.probe["checkpoints"][name]["ablation"]]


def layer_shares(facts: Facts) -> pd.DataFrame:
    """`survival` of every layer: columns layer, stage, survival, share."""
    parts = [
        survival(gram, facts.measured.names, facts.merged_stages).assign(layer=layer)
        for layer, gram in sorted(facts.measured.grams.items())
        if layer >= 0 and gram[-1, -1] > 0
    ]
    empty = pd.DataFrame({"stage": ["unexplained"], "survival": [math.nan], "share": [0.0], "layer": [0]})
    return pd.concat(parts) if parts else empty


def layer_rows(facts: Facts) -> list[dict[str, Any]]:
    """Relative change and floor by checkpoint, layer and module, for `dvc plots`."""
    rows = facts.measured.rows
    table = summarise(rows[rows["layer"] >= 0], ["stage", "layer", "module"])
    return [
        {
            "stage": row.stage,
            "layer": int(row.layer),
            "module": row.module,
            "relative_change": _rounded(row.relative_change),
            "floor": _rounded(row.floor),
        }
        for row in table.itertuples()
    ]


def metrics(facts: Facts) -> dict[str, Any]:
    """Flat numbers by stage for `dvc metrics`; what has no value is left out."""
    result: dict[str, Any] = {}
    for name in facts.measured.names:
        row = facts.whole.loc[name]
        numbers = {"relative_change": row.relative_change, "rounding_floor": row.floor}
        if name == "merged":
            numbers["unexplained"] = facts.kept.loc["unexplained", "share"]
        else:
            own = facts.matrix[name][facts.settings.skills[name]]
            numbers |= {"survival": facts.kept["survival"].get(name), **own}
            numbers["retention"] = facts.retention[name]["retention"]
        result[name] = {
            key: _rounded(value) for key, value in numbers.items() if value is not None and math.isfinite(value)
        }
    return result | {"frozen_check": _rounded(facts.frozen["max_abs"].max())}


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


if __name__ == "__main__":
    run(main)
