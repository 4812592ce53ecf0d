"""The report in words: a headline of facts, guesses apart from them, and four numbers to see first.

A sentence follows from a comparison with its null: with chance, with what rounding alone makes, or with what was there
to be lost. Where there is nothing to compare, there is no sentence.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from analysis.changes.measured import KEYS
from analysis.changes.tables import summarise
from analysis.telling.facts import Facts
from analysis.telling.skills import Change
from analysis.telling.text import in_layers, percent, score, whole_percent
from stages.models.architecture import OUTSIDE

SENTENCES = 5
SHIFT = 0.15  # of a stage's change; one of which no more is missing is there in full
NORMS = r"norm|ln_"  # in the names of normalisations
HALF = 0.5  # of a stage's gain; a merge that keeps less has lost the skill rather than some of it


class Sentence(NamedTuple):
    """A sentence of the headline, and the section of the report that shows it."""

    text: str
    section: int


def headline(facts: Facts) -> list[Sentence]:
    """At most five sentences of fact, for a reader who knows no mathematics; what is wrong goes before what is well."""
    skills = _cite(1, [_learned(facts), *_later(facts), *_merge(facts)])
    touched, rounded_away = _touched(facts), _rounded_away(facts)
    wrong = [
        *_cite(5, touched),
        *_cite(4, _conflicts(facts) + _same_start(facts)),
        *_cite(3, rounded_away + _missing(facts) + _shifted(facts)),
        *_cite(2, _norms(facts)),
    ]
    well = [] if rounded_away else _cite(3, _rounding(facts))
    well += _cite(5, ["Nothing outside the declared layers changed."] if facts.declared and not touched else [])
    return [*skills, *wrong, *well][:SENTENCES]


def _cite(section: int, texts: list[str]) -> list[Sentence]:
    return [Sentence(text, section) for text in texts]


def _learned(facts: Facts) -> str:
    skills = []
    for name in facts.settings.stages:
        measure = facts.retention[name]["measure"]
        before, after = (facts.matrix[model][facts.settings.skills[name]][measure] for model in ("base", name))
        skills.append(f"{name} went {_from_to(before, after, measure)}")
    return f"On the skill that it was trained on, {'; '.join(skills)}."


def _later(facts: Facts) -> list[str]:
    later = [change for change in facts.changed if change.model != "merged"]
    harmed = [f"{change.model} took {_went(change)}" for change in later if change.worse]
    if harmed:
        return [f"Later stages harmed earlier skills: {'; '.join(harmed)}."]
    at_stake = any(change.at_stake for change in later)
    return ["No later stage lowered an earlier skill by more than chance explains."] if at_stake else []


def _merge(facts: Facts) -> list[str]:
    merge = [change for change in facts.changed if change.model == "merged"]
    lost = [_extent(facts, change) + _went(change) for change in merge if change.worse]
    if lost:
        return [f"The merge lost part of what the stages had learned: {'; '.join(lost)}."]
    kept = [_went(change) for change in merge if change.at_stake]
    return [f"The merge lost no skill by more than chance explains: {'; '.join(kept)}."] if kept else []


def _extent(facts: Facts, change: Change) -> str:
    retention = facts.retention[change.stage]["retention"]
    return "most of " if retention is not None and retention < HALF else ""


def _went(change: Change) -> str:
    return f"{change.dataset} {_from_to(change.before, change.after, change.measure)}"


def _from_to(before: float, after: float, measure: str) -> str:
    unit = "" if measure == "accuracy" else "a loss of "
    return f"from {unit}{score(before, measure)} to {score(after, measure)}"


def _touched(facts: Facts) -> list[str]:
    bad = facts.frozen[facts.frozen["max_abs"] != 0]
    if not len(bad):
        return []
    return [f"Something changed that was declared untouched: see the check of {', '.join(bad['checkpoint'])}."]


def _conflicts(facts: Facts) -> list[str]:
    """Pairs of stages whose changes point in opposite directions."""
    pairs = [f"{one} and {other} (cosine {angle:+.2f})" for (one, other), angle in facts.conflicts.items()]
    if not pairs:
        return []
    return [f"Stages undo each other, for their changes point in opposite directions: {', '.join(pairs)}."]


def _same_start(facts: Facts) -> list[str]:
    """Pairs of stages that read the same directions, as those do whose random matrices came from one seed.

    In a narrow model any two overlap: what counts is how far the overlap is from chance on the way to 1.
    """
    table = facts.measured.pairs.groupby(["first", "second"], sort=False)[["reads", "reads_by_chance"]].median()
    pairs = [
        f"{first} and {second} (overlap {row.reads:.2f}, by chance {row.reads_by_chance:.2f})"
        for (first, second), row in table.iterrows()
        if row.reads - row.reads_by_chance > facts.settings.warn.same_start * (1 - row.reads_by_chance)
    ]
    if not pairs:
        return []
    return [
        "Stages read the same directions, as those do that start from one seed, so that agreement between them says"
        f" nothing about what they learned: {', '.join(pairs)}."
    ]


def _rounded_away(facts: Facts) -> list[str]:
    """Stages whose change rounding to the file's dtype takes away: the error is about the change itself, or larger."""
    shares = facts.whole.loc[facts.merged_stages, "floor_share"]
    lost = shares[shares > facts.settings.warn.lost]
    if not facts.has_file or not len(lost):
        return []
    stages = ", ".join(f"{name} (the error is {percent(share)} of it)" for name, share in lost.items())
    dtype = facts.settings.merge.dtype
    advice = "" if dtype == "float32" else "; store the file as float32"
    return [f"Rounding to {dtype} takes away what a stage changed: {stages}{advice}."]


def _rounding(facts: Facts) -> list[str]:
    merged, dtype = facts.whole.loc["merged"], facts.settings.merge.dtype
    if not facts.has_file or not math.isfinite(merged.floor_share):
        return []
    if not merged.floor_share:
        return [f"Storing the merged model as {dtype} loses nothing of the change."]
    return [
        f"Storing the merged model as {dtype} rounds its weights: the rounding error is {percent(merged.floor_share)}"
        f" of the size of the whole change, and {percent(merged.rounded_away)} of the numbers that the merge moves are"
        " stored as if it had not."
    ]


def _survivals(facts: Facts) -> dict[str, float]:
    """Survival of each merged stage as a share of the weight that the merge was asked for, where that is one number."""
    survivals, weights = facts.survivals["survival"], facts.settings.merge.weights
    return {n: survivals[n] / w for n, w in weights.items() if isinstance(w, int | float) and w and n in survivals}


def _missing(facts: Facts) -> list[str]:
    limit = facts.settings.warn.kept
    lost = [f"{whole_percent(share)} of {name}" for name, share in _survivals(facts).items() if share < limit]
    if not lost:
        return []
    return [
        f"The merged model holds less than {whole_percent(limit)} of what the merge was asked for: {', '.join(lost)}."
    ]


def _shifted(facts: Facts) -> list[str]:
    """Stages that are in the merged model in full, and whose skill is not."""
    stages = []
    for change in facts.changed:
        if change.model == "merged" and change.worse and _survivals(facts).get(change.stage, 0) > 1 - SHIFT:
            lineage = facts.settings.lineage(change.stage)
            others = [name for name in facts.merged_stages if name not in lineage]
            before = [name for name in others if _first(facts, name) < _first(facts, change.stage)]
            if before:
                stages.append(f"{change.stage} (after {', '.join(before)})")
    if not stages:
        return []
    return [
        "The change of a stage is in the merged model in full and its skill is not, where others changed the layers"
        f" before it, which it reads: {'; '.join(stages)}."
    ]


def _first(facts: Facts, stage: str) -> int:
    """The first layer that a stage trained; OUTSIDE, which is before all of them, for an embedding."""
    return min(facts.records[stage]["layers"], default=OUTSIDE)


def _norms(facts: Facts) -> list[str]:
    """Normalisations whose gain moved by more than `warn.norm` of its size."""
    rows, limit = facts.measured.inside, facts.settings.warn.norm
    norms = summarise(rows[rows["module"].str.contains(NORMS)], KEYS)
    moved = norms[norms["relative_change"] > limit]
    if not len(moved):
        return []
    count = len(moved.drop_duplicates(KEYS[1:]))
    furthest = moved.loc[moved["relative_change"].idxmax()]
    return [
        f"{count} norm{'s' if count > 1 else ''} moved by more than {percent(limit)} of the gain, which scales all that"
        f" a layer reads; the furthest is {furthest['module']} of layer {furthest['layer']} in {furthest['stage']}, by"
        f" {percent(furthest['relative_change'])}."
    ]


def guesses(facts: Facts) -> list[str]:
    """Explanations that fit the facts but were not measured; none where no skill was harmed."""
    if not any(change.worse for change in facts.changed):
        return []
    shared = [
        f"{first} and {second} ({in_layers(common)})"
        for number, first in enumerate(facts.merged_stages)
        for second in facts.merged_stages[number + 1 :]
        if (common := sorted(set(facts.records[first]["layers"]) & set(facts.records[second]["layers"])))
    ]
    overlap = f" Here {', '.join(shared)} also write to the same layers." if shared else ""
    return [
        "Stages on different layers are not independent: a layer reads what the layers before it wrote, so a"
        f" change early in the model shifts what every later layer was trained on.{overlap}"
        " Training again with more replay, smaller merge weights or other layers would show whether that is the cause."
    ]


def cards(facts: Facts) -> list[dict[str, Any]]:
    """At most four numbers to see first; `warn` marks those that ask for a look."""
    return [*_skills_card(facts), *_rounding_card(facts), *_overlap_card(facts), *_frozen_card(facts)]


def _card(number: str, text: str, warn: bool) -> list[dict[str, Any]]:
    return [{"number": number, "text": text, "warn": warn}]


def _skills_card(facts: Facts) -> list[dict[str, Any]]:
    merge = [change for change in facts.changed if change.model == "merged" and (change.at_stake or change.worse)]
    kept = sum(not change.worse for change in merge)
    text = "skills are not worse after the merge"
    return _card(f"{kept} of {len(merge)}", text, kept < len(merge)) if merge else []


def _rounding_card(facts: Facts) -> list[dict[str, Any]]:
    share = facts.whole.loc["merged", "floor_share"]
    if not facts.has_file or not math.isfinite(share):
        return []
    text = "is the size of the rounding error in the file, against the change"
    return _card(percent(share), text, share > facts.settings.warn.rounding)


def _overlap_card(facts: Facts) -> list[dict[str, Any]]:
    if not facts.cosines:
        return []
    strongest = max(facts.cosines.values(), key=abs)
    meaning = "they undo each other" if facts.conflicts else "0 is unrelated, −1 undoes, +1 is the same"
    if facts.conflicts:
        strongest = min(facts.conflicts.values())
    return _card(f"{strongest:+.2f}", f"strongest overlap of two stages; {meaning}", bool(facts.conflicts))


def _frozen_card(facts: Facts) -> list[dict[str, Any]]:
    violations = int((facts.frozen["max_abs"] != 0).sum())
    text = "checkpoints changed what they declared untouched"
    return _card(str(violations), text, violations > 0) if len(facts.frozen) else []


def label(facts: Facts, name: str) -> str:
    """What a row of the matrix is, in a few words."""
    if name == "merged":
        return f"{facts.settings.merge.method}, {facts.settings.merge.dtype}"
    if name == "base":
        return "before training"
    stage = facts.settings.stages[name]
    return f"{stage.method}, {facts.trained(name)}, on {stage.parent}"
