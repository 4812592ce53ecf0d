"""The report in words: a headline of facts, guesses apart from them, and four numbers to see first."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from analysis.changes.tables import cosines
from analysis.telling.facts import Facts
from analysis.telling.skills import Change, score
from analysis.telling.text import percent

SENTENCES = 5
SHIFT = 0.15  # of a stage's change; one of which no more is missing is in the file in full
NORMS = r"norm|ln_"  # in the names of normalisations
HALF = 0.5  # of a stage's gain; a merge that keeps less has lost the skill rather than some of it


class Sentence(NamedTuple):
    """A sentence of the headline, and the section of the report that shows it."""

    text: str
    section: int


def headline(facts: Facts) -> list[Sentence]:
    """At most five sentences of fact, for a reader who knows no mathematics; what is wrong goes before what is well."""
    told = _cite(1, [_learned(facts), *_later(facts), _merge_sentence(facts)])
    touched, rounded = _touched(facts), _rounded_away(facts)
    wrong = [
        *_cite(5, touched),
        *_cite(4, _conflicts(facts) + _same_start(facts)),
        *_cite(3, rounded + _missing(facts) + _shifted(facts)),
        *_cite(2, _norms(facts)),
    ]
    well = [] if rounded else _cite(3, [_rounding_sentence(facts)])
    well += [] if touched else _cite(5, ["Nothing outside the declared layers changed."])
    return [*told, *wrong, *well][:SENTENCES]


def _cite(section: int, texts: list[str]) -> list[Sentence]:
    return [Sentence(text, section) for text in texts]


def _later(facts: Facts) -> list[str]:
    later = [change for change in facts.changed if change.model != "merged"]
    harmed = [f"{change.model} took {_went(change)}" for change in later if change.worse]
    if harmed:
        return [f"Later stages harmed earlier skills: {'; '.join(harmed)}."]
    return ["No later stage lowered an earlier skill by more than chance explains."] if later else []


def _touched(facts: Facts) -> list[str]:
    bad = facts.frozen[facts.frozen["max_abs"] != 0]
    if not len(bad):
        return []
    names = ", ".join(bad["checkpoint"])
    return [f"Something changed that was declared untouched: see the check of {names}."]


def _conflicts(facts: Facts) -> list[str]:
    """Pairs of stages whose changes point in opposite directions."""
    names, angles = list(facts.settings.stages), cosines(facts.gram)
    limit = facts.settings.warn.cosine
    pairs = [(i, j) for i in range(len(names)) for j in range(i) if angles[i, j] < limit]
    if not pairs:
        return []
    told = ", ".join(f"{names[j]} and {names[i]} (cosine {angles[i, j]:+.2f})" for i, j in pairs)
    return [f"Stages undo each other, for their changes point in opposite directions: {told}."]


def _same_start(facts: Facts) -> list[str]:
    """Pairs of stages that read the same directions, as those do whose random matrices came from one seed."""
    pairs = facts.measured.pairs.groupby(["first", "second"], sort=False)[["reads", "reads_by_chance"]].median()
    told = [
        f"{first} and {second} (overlap {row.reads:.2f}, by chance {row.reads_by_chance:.2f})"
        for (first, second), row in pairs.iterrows()
        if row.reads > facts.settings.warn.same_start
    ]
    if not told:
        return []
    return [
        "Stages read the same directions, as those do that start from one seed, so that agreement between them says"
        f" nothing about what they learned: {', '.join(told)}."
    ]


def _rounded_away(facts: Facts) -> list[str]:
    """Stages whose change rounding to the file's dtype takes away: the error is about the change itself, or larger."""
    limit = facts.settings.warn.lost
    lost = [name for name in facts.merged_stages if facts.whole.loc[name, "floor_share"] > limit]
    if not lost:
        return []
    told = ", ".join(f"{name} (the error is {percent(facts.whole.loc[name, 'floor_share'])} of it)" for name in lost)
    dtype = facts.settings.merge.dtype
    return [f"Rounding to {dtype} takes away what a stage changed: {told}; store the file as float32."]


def _kept(facts: Facts) -> dict[str, float]:
    """Survival of each merged stage as a share of the weight that the merge was asked for, where that is one number."""
    kept, weights = facts.kept["survival"], facts.settings.merge.weights
    return {n: kept[n] / w for n, w in weights.items() if isinstance(w, int | float) and w and n in kept}


def _missing(facts: Facts) -> list[str]:
    limit = facts.settings.warn.kept
    lost = {name: share for name, share in _kept(facts).items() if share < limit}
    if not lost:
        return []
    told = ", ".join(f"{100 * share:.0f} % of {name}" for name, share in lost.items())
    return [f"The file holds less than {100 * limit:.0f} % of what the merge was asked for: {told}."]


def _shifted(facts: Facts) -> list[str]:
    """Stages that are in the file in full, and whose skill is not."""
    told = []
    for change in facts.changed:
        if change.model == "merged" and change.worse and _kept(facts).get(change.stage, 0) > 1 - SHIFT:
            first = min(facts.records[change.stage]["layers"])
            lineage = [*facts.settings.ancestors(change.stage), change.stage]
            others = [n for n in facts.merged_stages if n not in lineage and min(facts.records[n]["layers"]) < first]
            if others:
                told.append(f"{change.stage} (after {', '.join(others)})")
    if not told:
        return []
    return [
        "The change of a stage is in the file in full and its skill is not, where others changed the layers before it,"
        f" which it reads: {'; '.join(told)}."
    ]


def _norms(facts: Facts) -> list[str]:
    """Normalisations whose gain moved by more than `warn.norm` of its size."""
    rows = facts.measured.rows[facts.measured.rows["module"].str.contains(NORMS)]
    limit = facts.settings.warn.norm
    rows = rows[rows["delta"] > limit * rows["weight"]]
    if not len(rows):
        return []
    worst = rows.loc[(rows["delta"] / rows["weight"]).idxmax()]
    return [
        f"{len(rows)} norms moved by more than {percent(limit)} of their gain, which scales all that a layer reads; the"
        f" furthest is {worst['module']} of layer {worst['layer']} in {worst['stage']}, by"
        f" {percent(worst['delta'] / worst['weight'])}."
    ]


def _learned(facts: Facts) -> str:
    told = []
    for name in facts.settings.stages:
        measure_name = facts.retention[name]["measure"]
        before, after = (facts.matrix[model][facts.settings.skills[name]][measure_name] for model in ("base", name))
        unit = "" if measure_name == "accuracy" else "a loss of "
        told.append(f"{name} went from {unit}{score(before, measure_name)} to {score(after, measure_name)}")
    return f"On the skill that it was trained on, {'; '.join(told)}."


def _went(change: Change) -> str:
    unit = "" if change.measure == "accuracy" else "a loss of "
    return (
        f"{change.dataset} from {unit}{score(change.before, change.measure)} to {score(change.after, change.measure)}"
    )


def _merge_sentence(facts: Facts) -> str:
    merge = [change for change in facts.changed if change.model == "merged"]
    lost = [change for change in merge if change.worse]
    if not lost:
        return f"The merge lost no skill by more than chance explains: {'; '.join(map(_went, merge))}."
    told = []
    for change in lost:
        kept = facts.retention[change.stage]["retention"]
        extent = "most of " if kept is not None and kept < HALF else ""
        told.append(f"{extent}{_went(change)}")
    return f"The merge lost part of what the stages had learned: {'; '.join(told)}."


def _rounding_sentence(facts: Facts) -> str:
    merged, dtype = facts.whole.loc["merged"], facts.settings.merge.dtype
    return (
        f"Storing the merged model as {dtype} rounds its weights: the rounding error is {percent(merged.floor_share)}"
        f" of the size of the whole change, and {percent(merged.unchanged)} of the trained numbers"
        " are stored as if they had not been trained."
    )


def guesses(facts: Facts) -> list[str]:
    """Explanations that fit the facts but were not measured; none where no skill was harmed."""
    if not any(change.worse for change in facts.changed):
        return []
    shared = [
        f"{first} and {second} (layers {ranges(common)})"
        for place, first in enumerate(facts.merged_stages)
        for second in facts.merged_stages[place + 1 :]
        if (common := sorted(set(facts.records[first]["layers"]) & set(facts.records[second]["layers"])))
    ]
    overlap = f" Here {', '.join(shared)} also write to the same layers." if shared else ""
    return [
        "Stages on different layers are not independent: a layer reads what the layers before it wrote, so a"
        f" change early in the model shifts what every later layer was trained on.{overlap}"
        " Training again with more replay, smaller merge weights or other layers would show whether that is the cause."
    ]


def cards(facts: Facts) -> list[dict[str, Any]]:
    """Four numbers to see first; `warn` marks those that ask for a look."""
    limits = facts.settings.warn
    merge = [change for change in facts.changed if change.model == "merged"]
    kept = sum(not change.worse for change in merge)
    share = facts.whole.loc["merged", "floor_share"]
    stages = len(facts.settings.stages)
    overlaps = cosines(facts.gram)[:stages, :stages][np.triu_indices(stages, 1)]
    overlaps = overlaps[np.isfinite(overlaps)]
    strongest = float(overlaps[np.abs(overlaps).argmax()]) if len(overlaps) else 0.0
    violations = int((facts.frozen["max_abs"] != 0).sum())
    meaning = "they undo each other" if strongest < limits.cosine else "0 is unrelated, −1 undoes, +1 is the same"
    return [
        {
            "number": f"{kept} of {len(merge)}",
            "text": "skills are not worse after the merge",
            "warn": kept < len(merge),
        },
        {
            "number": percent(share),
            "text": "is the size of the rounding error in the file, against the change",
            "warn": share > limits.rounding,
        },
        {
            "number": f"{strongest:+.2f}",
            "text": f"strongest overlap of two stages; {meaning}",
            "warn": strongest < limits.cosine,
        },
        {
            "number": violations,
            "text": "checkpoints changed what they declared untouched",
            "warn": violations > 0,
        },
    ]


def label(facts: Facts, name: str) -> str:
    """What a row of the matrix is, in a few words."""
    if name == "merged":
        return f"{facts.settings.merge.method}, {facts.settings.merge.dtype}"
    if name == "base":
        return "before training"
    record = facts.records[name]
    return f"{record['method']}, layers {ranges(record['layers'])}, on {record['parent']}"


def ranges(layers: list[int]) -> str:
    """Sorted layer numbers as `0-3, 8`."""
    starts = [layer for layer in layers if layer - 1 not in layers]
    ends = [layer for layer in layers if layer + 1 not in layers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
