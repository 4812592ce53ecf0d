"""What the templates tell."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from analysis.changes.measured import CONFLICT, INTERFERENCE, KEYS, PAIRS, STRONGEST, TESTED
from analysis.changes.metrics import METRICS
from analysis.changes.tables import NO_STAGE, summarise
from analysis.telling.answers import SAME, by_kind, counts, mark, side_by_side, speakers
from analysis.telling.facts import Facts
from analysis.telling.log import actions
from analysis.telling.skills import LOSS_RISE, MARGIN
from analysis.telling.text import NOTHING, UNITS, in_layers, measured, number, percent, score, scored, whole_percent
from analysis.telling.words import NORMS, cards, guesses, headline, label
from stages.models.architecture import OUTSIDE

SHOWN = 3  # questions of each kind, side by side
LONG = 240  # characters of a text that are shown before it is unfolded
WRITERS = r"\b(?:o_proj|down_proj|c_proj|out_proj|dense|fc2|wo|w2)$"  # matrices that write to the residual stream


def render(template: str, content: dict[str, Any]) -> str:
    """The page (`report.html`, self-contained) or its short form (`report.md`).

    Args:
        template: file in analysis/telling/templates.
        content: what it tells, by the names that it uses; METRICS are there for every template.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=template.endswith(".html"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    filters = [in_layers, mark, measured, number, percent, score, scored, whole_percent]
    environment.filters |= {each.__name__: each for each in filters}
    environment.globals["metrics"] = METRICS
    return environment.get_template(template).render(content)


def contents(facts: Facts, pictures: dict[str, str]) -> dict[str, Any]:
    """What the templates tell, by the names that they use; what is empty or not among the pictures is left out."""
    return {
        "base": facts.records["base"],
        "settings": facts.settings,
        "has_file": facts.has_file,
        "headline": headline(facts),
        "guesses": guesses(facts),
        "cards": cards(facts),
        "pictures": pictures,
        "skills": _skill_rows(facts),
        "routed": _routed_rows(facts),
        "scorers": _scorer_rows(facts),
        "plain": ", ".join(_asked_plainly(facts.settings.datasets)),
        "cut": _ended(facts, "cut"),
        "unasked": _ended(facts, "unasked"),
        "margin": MARGIN,
        "loss_rise": LOSS_RISE,
        "answers": _answer_rows(facts),
        "same": SAME,
        "shown": SHOWN,
        "long": LONG,
        "directions": _direction_rows(facts),
        "wrote_inside": bool(len(facts.measured.inside)),
        "moved": _moved_rows(facts),
        "from_zero": bool(summarise(facts.measured.inside, KEYS)["relative_change"].isna().any()),
        "pairs": _pair_rows(facts),
        "strongest": STRONGEST,
        "tested": TESTED,
        "conflicts": _conflict_rows(facts),
        "weights": _weight_rows(facts),
        "unexplained": facts.survivals.loc[NO_STAGE, "share"],
        "frozen": list(facts.frozen.itertuples()),
        "log": actions(facts),
        "probe": facts.probe,
        "rounding": facts.rounding,
        "behaviour": behaviour_rows(facts.probe),
    }


def _skill_rows(facts: Facts) -> list[dict[str, Any]]:
    rows = []
    for name in facts.settings.stages:
        retention = facts.retention[name]
        values = [facts.matrix[model][retention["dataset"]][retention["measure"]] for model in ("base", name, "merged")]
        row = {
            "stage": name,
            "label": label(facts, name),
            "scores": [score(value, retention["measure"]) for value in values],
            "unit": UNITS[retention["measure"]].strip() or retention["measure"],
            "kept": _kept(retention) + ("" if name in facts.settings.merge.weights else " (not merged)"),
        }
        rows.append(row | retention)
    return rows


def _routed_rows(facts: Facts) -> list[dict[str, Any]]:
    """What each routed model chose for the questions of every dataset, and what it weighs beside the base."""
    rows = []
    for name, routing in facts.evaluation["routing"].items():
        choices = ["base", *routing["choices"]]
        chosen = [(dataset, [counts.get(each, 0) for each in choices]) for dataset, counts in routing["chosen"].items()]
        bytes_of = {key: sum(each[key] for each in routing["choices"].values()) for key in ("low_rank", "whole")}
        whole = [choice for choice, each in routing["choices"].items() if each["whole"]]
        error = max(each["error"] for each in routing["choices"].values())
        rows.append(
            routing
            | {"name": name, "error": error, "choices": choices, "chosen": chosen, "bytes": bytes_of, "whole": whole}
        )
    return rows


def _kept(retention: dict[str, Any]) -> str:
    """The share of the gain that is left in the merged model, with its 95 % interval."""
    if retention["retention"] is None:
        return "nothing gained"
    ends = f" ({' to '.join(map(whole_percent, retention['interval']))})" if retention["interval"] else " (unclear)"
    return whole_percent(retention["retention"]) + ends


def _scorer_rows(facts: Facts) -> list[dict[str, Any]]:
    """How the answers of each dataset, and of each part of a mix, are scored and why."""
    return [
        {"dataset": _part(name, part), **chosen}
        for name, parts in facts.scorers.items()
        for part, chosen in parts.items()
    ]


def _asked_plainly(datasets: dict[str, Any]) -> list[str]:
    """Datasets, and parts of a mix, whose prompts are not put into the chat template."""
    parts = {name: getattr(each, "parts", {name: each}) for name, each in datasets.items()}
    return [
        _part(name, part)
        for name, each in parts.items()
        for part, settings in each.items()
        if settings.format == "plain"
    ]


def _ended(facts: Facts, end: str) -> str:
    """How many answers of each model ended so, such as `sums: base 3, merged 1 of 100`."""
    told = []
    for dataset, rows in facts.answers.groupby("dataset", sort=False):
        ended = rows[rows["end"] == end].groupby("model", sort=False).size()
        asked = rows.groupby("model")["end"].count().max()
        if len(ended):
            told.append(f"{dataset}: {', '.join(f'{model} {count}' for model, count in ended.items())} of {asked}")
    return "; ".join(told)


def _part(dataset: str, part: str) -> str:
    """What a part of a mix is called; any other dataset has one part, itself."""
    return dataset if part == dataset else f"{dataset}, {part}"


def _answer_rows(facts: Facts) -> list[dict[str, Any]]:
    """The first questions of each kind of every dataset whose answers have scores, and how many there are."""
    rows = []
    for dataset in facts.settings.datasets:
        if questions := side_by_side(facts.answers, dataset, speakers(dataset, facts.settings.skills)):
            kinds = [(kind, len(each), each[:SHOWN]) for kind, each in by_kind(questions).items()]
            rows.append({"dataset": dataset, "counts": counts(questions), "kinds": kinds})
    return rows


def _direction_rows(facts: Facts) -> list[dict[str, Any]]:
    """Over the weight matrices of each checkpoint: directions that the middle one uses, the strongest, and new ones."""
    rows: list[dict[str, Any]] = []
    for name in facts.measured.names:
        own = facts.measured.rows[facts.measured.rows["stage"] == name]
        tested = own["intruders"].dropna()
        row = {"stage": name, "intruders": int(tested.sum()), "tested": TESTED * len(tested)}
        row |= dict.fromkeys(("used", "available", "loudness", "norm")) | {"strongest": NOTHING}
        if len(matrices := own.dropna(subset=["effective_rank"])):
            strongest = matrices.loc[matrices["spectral_norm"].idxmax()]
            row |= {
                "used": matrices["effective_rank"].median(),
                "available": int(matrices["directions"].median()),
                "loudness": matrices["stable_rank"].median(),
                "strongest": f"{strongest['module']} of layer {strongest['layer']}",
                "norm": strongest["spectral_norm"],
            }
        if row["tested"] or own.loc[own["layer"] != OUTSIDE, "effective_rank"].notna().any():
            rows.append(row)
    return rows


def _moved_rows(facts: Facts) -> list[dict[str, Any]]:
    """Relative change of what reads the residual stream and of what writes to it, and the norm that moved furthest."""
    rows = []
    for name in facts.measured.names:
        own = facts.measured.inside[facts.measured.inside["stage"] == name]
        matrices = own[own["parameter"].eq("weight") & ~own["module"].str.contains(NORMS)]
        writes = matrices["module"].str.contains(WRITERS)
        row: dict[str, Any] = {"stage": name, "norms": 0, "norm": None, "furthest": NOTHING}
        for key, part in (("reads", matrices[~writes]), ("writes", matrices[writes])):
            row[key] = summarise(part, ["stage"])["relative_change"].iloc[0] if len(part) else None
        norms = summarise(own[own["module"].str.contains(NORMS)], KEYS)
        row["norms"] = len(norms)
        if norms["relative_change"].notna().any():
            furthest = norms.loc[norms["relative_change"].idxmax()]
            row |= {"norm": furthest["relative_change"]}
            row |= {"furthest": f"{furthest['module']} of layer {furthest['layer']}"}
        rows.append(row)
    return [row for row in rows if row["norms"] or row["reads"] is not None or row["writes"] is not None]


def _pair_rows(facts: Facts) -> list[dict[str, Any]]:
    """How far two stages use the same directions, over the matrices that both change."""
    return [
        {
            "stages": f"{first}, {second}",
            "layers": sorted(set(table["layer"]) - {OUTSIDE}),
            **table[PAIRS[4:]].median(),
        }
        for (first, second), table in facts.measured.pairs.groupby(["first", "second"], sort=False)
    ]


def _conflict_rows(facts: Facts) -> list[dict[str, Any]]:
    """Stages that change the same tensors: whether they pull them apart, beside what unrelated changes would do."""
    rows = []
    for stages, table in facts.measured.conflicts.groupby("stages", sort=False):
        totals = table[CONFLICT + INTERFERENCE].sum()
        if totals["entries"]:
            rows.append(
                {
                    "stages": stages,
                    "layers": sorted(set(table["layer"]) - {OUTSIDE}),
                    "disagree": totals["disagreeing"] / totals["entries"],
                    "disagree_by_chance": 1 - 2.0 ** -str(stages).count(","),
                    "cancelled": 1 - totals["summed"] / totals["size"],
                    "cancelled_by_chance": 1 - totals["summed_by_chance"] / totals["size"],
                    "interference": totals["interference"] / (totals["interference_by_chance"] or math.nan),
                }
            )
    return rows


def behaviour_rows(probe: dict[str, Any]) -> list[dict[str, Any]]:
    """What the running models do beside the base: predictions, and where attention goes (means over heads).

    Below what running the base in another dtype makes, no part of a change is told, and no head that moved.
    """
    floor = probe["floor"]
    return [
        {
            "name": name,
            "on": checkpoint["on"]["kl"]["mean"],
            "off": checkpoint["off"]["kl"],
            "early": checkpoint["early"]["share"] if checkpoint["off"]["kl"]["mean"] > floor["kl"] else None,
            "attention": _attention(checkpoint["attention"], probe["base"]["attention"], floor["attention"]),
        }
        for name, checkpoint in probe["checkpoints"].items()
    ]


def _attention(after: dict[str, Any], before: dict[str, Any], floor: float) -> dict[str, Any] | None:
    """Where the attention goes, and went in the base; None for a model that has none, such as Mamba."""
    moved = np.array(after["divergence"], float)  # [layers, heads]
    if np.isnan(moved).all():
        return None
    layer, head = np.unravel_index(np.nanargmax(moved), moved.shape)
    sink, entropy = (_mean(after[key]) - _mean(before[key]) for key in ("sink", "entropy"))
    return {
        "sink_begins": after["sets_in"],
        "sink_began": before["sets_in"],
        "sink": sink,
        "entropy": entropy,
        "moved_most": f"layer {layer}, head {head}" if np.nanmax(moved) > floor else NOTHING,
    }


def _mean(values: list[list[float | None]]) -> float:
    """Over layers and heads, without the layers that have no attention."""
    return float(np.nanmean(np.array(values, float)))


def _weight_rows(facts: Facts) -> list[dict[str, Any]]:
    """Metrics of each checkpoint beside the weight that the merge was asked for and what is left of it."""
    survivals, weights = facts.survivals["survival"], facts.settings.merge.weights
    rows = [
        {
            "stage": name,
            **facts.whole.loc[name].to_dict(),
            "weight": weights.get(name, NOTHING),
            "survival": survivals.get(name) if name in weights else None,
        }
        for name in facts.measured.names
    ]
    return rows if len(facts.measured.rows) else []
