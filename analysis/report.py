"""The report of what the training changed, in one HTML file: `python -m analysis.report`.

Reads params.yaml, checkpoints/, merged/ and what the other stages left in reports/. Writes reports/report.html,
report.md (the same in short, for a pull request), lineage.json (its log of actions), evaluation.svg and layers.svg (two
of its pictures), deltas.parquet (every number about weights), layers.json (for `dvc plots`) and metrics.json (for `dvc
metrics`). No times and no chance: a second run writes the same bytes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from analysis import figures
from analysis.deltas import CONFLICT, INTERFERENCE, summarise, survival, tidy
from analysis.facts import Facts, gather
from analysis.figures import percent
from analysis.log import actions
from analysis.skills import score
from analysis.subspaces import LOOKED_AT, STRONGEST
from analysis.words import NORMS, cards, guesses, headline, label, ranges
from stages import params
from stages.errors import run
from stages.files import REPORTS, write_json, write_text
from stages.layers import OUTSIDE

WRITERS = r"\b(?:o_proj|down_proj|c_proj|out_proj|dense|fc2|wo|w2)$"  # matrices that write to the residual stream


def main() -> None:
    """Measure, then write every file of the report."""
    settings = params.load()
    torch.set_num_threads(settings.threads)
    write(gather(settings))


def write(facts: Facts) -> None:
    """Write every file of the report."""
    pictures = draw(facts)
    for name in ("evaluation", "layers"):
        write_text(REPORTS / f"{name}.svg", pictures[name])
    write_json(REPORTS / "layers.json", layer_rows(facts))
    tidy(facts.measured.rows, facts.heads).to_parquet(REPORTS / "deltas.parquet", index=False)
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
        "evaluation": figures.evaluation_matrix(facts.matrix, labels, facts.settings.skills, facts.changed),
        "layers": figures.heat_maps(by_module, measured.names, titles, measured.modules, measured.layers),
        "floor": figures.floor_lines(by_layer[by_layer["stage"] == "merged"], measured.layers),
        "whose": figures.whose_change(layer_shares(facts), list(facts.settings.stages), measured.layers),
        "cosines": figures.cosine_maps(
            facts.gram, measured.grams, measured.names, measured.layers, paired=len(measured.names) - 1
        ),
        "drift": figures.drift_lines(facts.probe, measured.layers),
        "behaviour": figures.behaviour_lines(facts.probe, measured.layers),
        "heads": figures.head_maps(
            facts.heads[facts.heads["stage"] == "merged"],
            facts.probe["checkpoints"]["merged"]["attention"]["divergence"],
        ),
        "ablation": figures.ablation_map(facts.probe["ablation"], facts.settings.skills),
        "curves": figures.loss_curves({name: curve for name, curve in facts.curves.items() if curve}),
    }


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


def render(template: str, told: dict[str, Any]) -> str:
    """The page (`report.html`, self-contained) or its short form (`report.md`).

    Args:
        template: file in analysis/templates.
        told: from `contents`.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=template.endswith(".html"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["percent"] = percent
    environment.filters["score"] = score
    return environment.get_template(template).render(told)


def contents(facts: Facts, pictures: dict[str, str]) -> dict[str, Any]:
    """What the templates tell, by the names that they use."""
    return {
        "base": facts.records["base"],
        "settings": facts.settings,
        "headline": headline(facts),
        "guesses": guesses(facts),
        "cards": cards(facts),
        "pictures": pictures,
        "skills": _skill_rows(facts),
        "directions": _direction_rows(facts),
        "moved": _moved_rows(facts),
        "pairs": _pair_rows(facts),
        "strongest": STRONGEST,
        "conflicts": _conflict_rows(facts),
        "left": _left_rows(facts),
        "unexplained": facts.kept.loc["unexplained", "share"],
        "frozen": list(facts.frozen.itertuples()),
        "log": actions(facts),
        "probe": facts.probe,
        "behaviour": _behaviour_rows(facts.probe),
    }


def _skill_rows(facts: Facts) -> list[dict[str, Any]]:
    rows = []
    for name in facts.settings.stages:
        kept = facts.retention[name]
        values = [facts.matrix[model][kept["dataset"]][kept["measure"]] for model in ("base", name, "merged")]
        row = {
            "stage": name,
            "label": label(facts, name),
            "scores": [score(value, kept["measure"]) for value in values],
            "merged": name in facts.settings.merge.weights,
        }
        rows.append(row | kept)
    return rows


def _direction_rows(facts: Facts) -> list[dict[str, Any]]:
    """Over the weight matrices of each checkpoint: directions that the middle one uses, the strongest, and new ones."""
    rows: list[dict[str, Any]] = []
    for name in facts.measured.names:
        own = facts.measured.rows[facts.measured.rows["stage"] == name]
        looked_at = own["intruders"].dropna()
        row = {"stage": name, "intruders": int(looked_at.sum()), "looked_at": LOOKED_AT * len(looked_at)}
        if len(matrices := own.dropna(subset=["effective_rank"])):
            strongest = matrices.loc[matrices["spectral_norm"].idxmax()]
            row |= {
                "used": matrices["effective_rank"].median(),
                "available": int(matrices["directions"].median()),
                "loudness": matrices["stable_rank"].median(),
                "strongest": f"{strongest['module']} of layer {strongest['layer']}",
                "norm": strongest["spectral_norm"],
            }
        rows.append(row)
    return [row for row in rows if row["looked_at"]]


def _moved_rows(facts: Facts) -> list[dict[str, Any]]:
    """Relative change of what reads the residual stream and of what writes to it, and the norm that moved furthest."""
    rows, inside = [], facts.measured.rows[facts.measured.rows["layer"] != OUTSIDE]
    for name in facts.measured.names:
        own = inside[inside["stage"] == name]
        matrices = own[own["parameter"].eq("weight") & ~own["module"].str.contains(NORMS)]
        writes = matrices["module"].str.contains(WRITERS)
        row: dict[str, Any] = {"stage": name, "norms": 0, "norm": None, "furthest": "–"}
        for key, part in (("reads", matrices[~writes]), ("writes", matrices[writes])):
            row[key] = summarise(part, ["stage"])["relative_change"].iloc[0] if len(part) else None
        norms = own[own["module"].str.contains(NORMS)]
        if len(norms):
            drift = norms["delta"] / norms["weight"]
            furthest = norms.loc[drift.idxmax()]
            row |= {"norm": drift.max(), "norms": len(norms)}
            row["furthest"] = f"{furthest['module']} of layer {furthest['layer']}"
        rows.append(row)
    return rows


def _pair_rows(facts: Facts) -> list[dict[str, Any]]:
    """How far two stages use the same directions, over the matrices that both change."""
    return [
        {
            "stages": f"{first}, {second}",
            "layers": ranges(sorted(set(found["layer"]) - {OUTSIDE})),
            **found[["reads", "reads_by_chance", "writes", "writes_by_chance"]].median(),
        }
        for (first, second), found in facts.measured.pairs.groupby(["first", "second"], sort=False)
    ]


def _conflict_rows(facts: Facts) -> list[dict[str, Any]]:
    """Stages that change the same tensors: whether they pull them apart, beside what unrelated changes would do."""
    rows = []
    for stages, found in facts.measured.conflicts.groupby("stages", sort=False):
        totals = found[CONFLICT + INTERFERENCE].sum()
        if totals["entries"]:
            rows.append(
                {
                    "stages": stages,
                    "layers": ranges(sorted(set(found["layer"]) - {OUTSIDE})),
                    "disagree": totals["disagreeing"] / totals["entries"],
                    "disagree_by_chance": 1 - 2.0 ** -str(stages).count(","),
                    "cancelled": 1 - totals["summed"] / totals["size"],
                    "cancelled_by_chance": 1 - totals["summed_by_chance"] / totals["size"],
                    "interference": totals["interference"] / (totals["interference_by_chance"] or math.nan),
                }
            )
    return rows


def _behaviour_rows(probe: dict[str, Any]) -> list[dict[str, Any]]:
    """What the running models do beside the base: predictions, and where attention goes (means over heads)."""
    rows, base = [], probe["base"]["attention"]
    for name, found in probe["checkpoints"].items():
        attention, moved = found["attention"], np.array(found["attention"]["divergence"])
        layer, head = np.unravel_index(moved.argmax(), moved.shape)
        rows.append(
            {
                "name": name,
                "on": found["on"]["kl"]["mean"],
                "off": found["off"]["kl"],
                "early": found["early"]["share"],
                "sets_in": [attention["sets_in"], base["sets_in"]],
                "sink": np.mean(attention["sink"]) - np.mean(base["sink"]),
                "entropy": np.mean(attention["entropy"]) - np.mean(base["entropy"]),
                "moved_most": f"layer {layer}, head {head}",
            }
        )
    return rows


def _left_rows(facts: Facts) -> list[dict[str, Any]]:
    kept = facts.kept["survival"]
    weights = facts.settings.merge.weights
    return [
        {
            "stage": name,
            **facts.whole.loc[name].to_dict(),
            "weight": weights.get(name),
            "survival": kept.get(name) if name in weights else None,
        }
        for name in facts.measured.names
    ]


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


if __name__ == "__main__":
    run(main)
