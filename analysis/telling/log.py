"""The log of actions: what each stage was given, trained, changed, cost and gained, and who changed it since."""

from __future__ import annotations

import math
from typing import Any

from analysis.changes.measured import KEYS
from analysis.telling.facts import Facts
from analysis.telling.text import ranges
from stages.files import rounded
from stages.models.architecture import OUTSIDE


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
            "layers": facts.trained(name),
            "parameters": record["trained_parameters"],
            "settings": record["settings"],
            "seed": record.get("seed"),
        },
        "changed": {
            "tensors": len(rows),
            "layers": ranges(sorted(set(rows["layer"]) - {OUTSIDE})),
            "relative_change": rounded(facts.whole.loc[name, "relative_change"]),
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
    rows, skill = facts.measured.rows, facts.settings.skills[name]
    own, entries = rows.loc[rows["stage"] == name, KEYS[1:]], []
    for later in facts.settings.stages:
        if name in facts.settings.ancestors(later):
            shared = own.merge(rows.loc[rows["stage"] == later, KEYS[1:]])
            entry = {"by": later, "tensors": len(shared)}
            if len(shared):
                entry["cosine"] = rounded(facts.cosines[name, later])
            for change in facts.changed:
                if change.model == later and change.dataset == skill:
                    entry |= {"before": change.before, "after": change.after}
            entries.append(entry)
    return entries


def _merged(facts: Facts, name: str) -> list[dict[str, Any]]:
    """What the merge left of it; nothing for a stage that is not merged."""
    if name not in facts.merged_stages:
        return []
    retention, dataset = facts.retention[name], facts.settings.skills[name]
    return [
        {
            "by": "merged",
            "survival": rounded(float(facts.survivals["survival"].get(name, math.nan))),
            "before": facts.matrix[name][dataset][retention["measure"]],
            "after": facts.matrix["merged"][dataset][retention["measure"]],
            "retention": retention["retention"],
        }
    ]
