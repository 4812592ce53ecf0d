"""The report of what the training changed, in one HTML file: `python -m analysis.report`.

Reads params.yaml and what the other stages left in reports/, and no weight of any model. Writes reports/report.html,
report.md (the same in short, for a pull request), lineage.json (its log of actions), evaluation.svg and layers.svg (two
of its pictures), deltas.parquet (every number about weights), layers.json (for `dvc plots`) and metrics.json (for `dvc
exp show`). No times and no chance: a second run writes the same bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from analysis.changes.measured import MERGED
from analysis.changes.tables import NO_STAGE, summarise, survival, tidy
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
from stages.files import REPORTS, rounded, write_json, write_text
from stages.models.architecture import OUTSIDE
from stages.project.params import load_params


def main() -> None:
    """Write every file of the report."""
    write(gather(load_params()))


def write(facts: Facts) -> None:
    """Write every file of the report."""
    files, pictures = draw_files(facts), draw(facts)
    for name, picture in files.items():
        write_text(REPORTS / f"{name}.svg", picture)
    write_json(REPORTS / "layers.json", layer_rows(facts))
    tidy(facts.measured.rows, facts.measured.heads).to_parquet(REPORTS / "deltas.parquet", index=False)
    write_json(REPORTS / "metrics.json", metrics(facts))
    content = contents(facts, files | pictures)
    write_json(REPORTS / "lineage.json", content["log"])
    for template in ("report.md", "report.html"):
        write_text(REPORTS / template, render(template, content))


def draw_files(facts: Facts) -> dict[str, str]:
    """The pictures that are files too, and so always there, as SVG by name."""
    measured = facts.measured
    labels = {name: label(facts, name) for name in facts.matrix}
    titles = [f"{name} · {labels[name]}" for name in measured.names]
    by_module = summarise(measured.inside, ["stage", "layer", "module"])
    return {
        "evaluation": evaluation_matrix(facts.evaluation, labels, facts.settings.skills, facts.changed + facts.guarded),
        "layers": heat_maps(by_module, measured.names, titles, measured.modules, measured.layers),
    }


def draw(facts: Facts) -> dict[str, str]:
    """The other pictures, as SVG by name; one with nothing to show is left out."""
    measured, probe, skills = facts.measured, facts.probe, facts.settings.skills
    pictures = {
        "drift": drift_lines(probe, measured.layers),
        "behaviour": behaviour_lines(probe, measured.layers),
    }
    by_layer = summarise(measured.inside[measured.inside["stage"] == MERGED], ["layer"])
    if by_layer["relative_change"].notna().any():
        pictures["floor"] = floor_lines(by_layer, measured.layers)
    if len(shares := layer_shares(facts)):
        pictures["whose"] = whose_change(shares, list(facts.settings.stages), measured.layers)
    if facts.cosines:
        paired = len(facts.settings.stages)
        pictures["cosines"] = cosine_maps(facts.gram, measured.grams, measured.names, measured.layers, paired)
    heads = measured.heads[measured.heads["stage"] == MERGED]
    divergence = probe["checkpoints"][MERGED]["attention"]["divergence"]
    if len(heads) or np.nan_to_num(np.array(divergence, float)).any():
        pictures["heads"] = head_maps(heads, divergence)
    if rows := [row for name in facts.settings.stages for row in probe["checkpoints"][name]["ablation"]]:
        pictures["ablation"] = ablation_map(rows, skills)
    if curves := {name: curve for name, curve in facts.curves.items() if curve}:
        pictures["curves"] = loss_curves(curves)
    return pictures


def layer_shares(facts: Facts) -> pd.DataFrame:
    """`survival` of every layer that the merge changes: columns layer, stage, survival, share; empty without one."""
    parts = [
        survival(gram, facts.measured.names, facts.merged_stages).assign(layer=layer)
        for layer, gram in sorted(facts.measured.grams.items())
        if layer != OUTSIDE and gram[-1, -1] > 0
    ]
    return pd.concat(parts) if parts else pd.DataFrame()


def layer_rows(facts: Facts) -> list[dict[str, Any]]:
    """Relative change and floor by checkpoint, layer and module, for `dvc plots`; weights of zero have none."""
    table = summarise(facts.measured.inside, ["stage", "layer", "module"]).dropna(subset="relative_change")
    return [
        {
            "stage": row.stage,
            "layer": int(row.layer),
            "module": row.module,
            "relative_change": rounded(row.relative_change),
            "floor": rounded(row.floor),
        }
        for row in table.itertuples()
    ]


def metrics(facts: Facts) -> dict[str, Any]:
    """The few numbers that `dvc exp show` has a column for; what has no value is left out.

    Returns:
        By stage, the share of its gain that the merge `kept`, and how well the stage itself does by its skill's own
        measure. Of the merged model, the size of its `change`, the `floor` that rounding alone makes of it, and the
        share that no stage explains.
    """
    result: dict[str, Any] = {}
    for name, found in facts.retention.items():
        measure = found["measure"]
        result[name] = {"kept": found["retention"], measure: facts.matrix[name][found["dataset"]][measure]}
    whole, unexplained = facts.whole.loc[MERGED], facts.survivals.loc[NO_STAGE, "share"]
    result[MERGED] = {"change": whole.relative_change, "floor": whole.floor, "unexplained": unexplained}
    return {
        name: {key: value for key, value in rounded(numbers).items() if value is not None}
        for name, numbers in result.items()
    }


if __name__ == "__main__":
    run(main)
