"""The log of actions: what each stage was given, trained, changed, cost and gained, and who changed it since."""

from __future__ import annotations

from typing import Any

import numpy as np

from analysis.changes.tables import cosines
from analysis.telling.facts import Facts
from analysis.telling.words import ranges

TENSOR = ["layer", "module", "parameter"]  # the columns that name one


def actions(facts: Facts) -> list[dict[str, Any]]:
    """One entry for each stage, in the order of params.yaml, that can be written as JSON."""
    return [_action(facts, name) for name in facts.settings.stages]


def _action(facts: Facts, name: str) -> dict[str, Any]:
    stage, record = facts.settings.stages[name], facts.records[name]
    spent = facts.spent[name]
    measure, skill = facts.retention[name]["measure"], facts.settings.skills[name]
    rows = facts.measured.rows[facts.measured.rows["stage"] == name]
    return {
        "stage": name,
        "given": {
            "parent": stage.parent,
            "parent_sha256": record.get("parent_sha256"),
            "dataset": stage.dataset,
            "dataset_sha256": record.get("dataset_sha256"),
        },
        "trained": {
            "method": stage.method,
            "layers": ranges(record["layers"]),
            "parameters": record["trained_parameters"],
            "settings": record["settings"],
            "seed": record.get("seed"),
        },
        "changed": {
            "tensors": len(rows),
            "layers": ranges(sorted(set(rows["layer"]) - {-1})),
            "relative_change": _rounded(facts.whole.loc[name, "relative_change"]),
            "sha256": record.get("sha256"),
        },
        "cost": {
            "steps": spent.get("steps"),
            "tokens": spent.get("tokens"),
            "checkpoint_bytes": record["bytes"],
        },
        "gained": {
            "skill": skill,
            "measure": measure,
            "before": facts.matrix[stage.parent][skill][measure],
            "after": facts.matrix[name][skill][measure],
        },
        "since": [*_later(facts, name), *_merged(facts, name)],
    }


def _later(facts: Facts, name: str) -> list[dict[str, Any]]:
    """Stages built on this one that write to its tensors or change its skill."""
    rows, names = facts.measured.rows, facts.measured.names
    own = rows.loc[rows["stage"] == name, TENSOR]
    told = []
    for later in facts.settings.stages:
        if name in facts.settings.ancestors(later):
            shared = own.merge(rows.loc[rows["stage"] == later, TENSOR])
            skill = [c for c in facts.changed if c.model == later and c.dataset == facts.settings.skills[name]]
            entry = {"by": later, "tensors": len(shared)}
            if len(shared):
                entry["cosine"] = _rounded(cosines(facts.gram)[names.index(name), names.index(later)])
            told.append(entry | ({"before": skill[0].before, "after": skill[0].after} if skill else {}))
    return told


def _merged(facts: Facts, name: str) -> list[dict[str, Any]]:
    """What the merge left of it; nothing for a stage that is not merged."""
    if name not in facts.merged_stages:
        return []
    retention, dataset = facts.retention[name], facts.settings.skills[name]
    return [
        {
            "by": "merged",
            "survival": _rounded(facts.kept["survival"].get(name, np.nan)),
            "before": facts.matrix[name][dataset][retention["measure"]],
            "after": facts.matrix["merged"][dataset][retention["measure"]],
            "retention": retention["retention"],
        }
    ]


def _rounded(value: float) -> float | None:
    return float(f"{value:.6g}") if np.isfinite(value) else None
