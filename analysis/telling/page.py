"""What the templates tell."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from analysis.changes.measured import CONFLICT, INTERFERENCE, STRONGEST, TESTED
from analysis.changes.tables import summarise
from analysis.telling.facts import Facts
from analysis.telling.log import actions
from analysis.telling.skills import score
from analysis.telling.text import percent
from analysis.telling.words import NORMS, cards, guesses, headline, label, ranges
from stages.models.architecture import OUTSIDE

WRITERS = r"\b(?:o_proj|down_proj|c_proj|out_proj|dense|fc2|wo|w2)$"  # matrices that write to the residual stream


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
        row = {"stage": name, "intruders": int(looked_at.sum()), "looked_at": TESTED * len(looked_at)}
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
