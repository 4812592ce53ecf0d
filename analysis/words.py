"""The report in words: a headline of facts, guesses apart from them, and four numbers to see first."""

from __future__ import annotations

from typing import Any

import numpy as np

from analysis.deltas import cosines
from analysis.facts import Facts
from analysis.figures import percent
from analysis.skills import Change, score

ROUNDING = 0.25  # rounding error, as a share of the change, from which a card warns
CONFLICT = -0.1  # cosine of two stages below which a card says that they undo each other
HALF = 0.5  # of a stage's gain; a merge that keeps less has lost the skill rather than some of it


def headline(facts: Facts) -> list[str]:
    """At most five sentences of fact, for a reader who knows no mathematics."""
    sentences = [_learned(facts)]
    later = [change for change in facts.changed if change.model != "merged"]
    harmed = [change for change in later if change.worse]
    if harmed:
        told = "; ".join(f"{change.model} took {_went(change)}" for change in harmed)
        sentences.append(f"Later stages harmed earlier skills: {told}.")
    elif later:
        sentences.append("No later stage lowered an earlier skill by more than chance explains.")
    sentences += [_merge_sentence(facts), _rounding_sentence(facts)]
    bad = facts.frozen[facts.frozen["max_abs"] != 0]
    if len(bad):
        names = ", ".join(bad["checkpoint"])
        sentences.append(f"Something changed that was declared untouched: see the check of {names} in section 5.")
    else:
        sentences.append("Nothing outside the declared layers changed.")
    return sentences


def _learned(facts: Facts) -> str:
    told = []
    for name, stage in facts.settings.stages.items():
        measure_name = facts.retention[name]["measure"]
        before, after = (facts.matrix[model][stage.dataset][measure_name] for model in ("base", name))
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
    merge = [change for change in facts.changed if change.model == "merged"]
    kept = sum(not change.worse for change in merge)
    share = facts.whole.loc["merged", "floor_share"]
    stages = len(facts.settings.stages)
    overlaps = cosines(facts.gram)[:stages, :stages][np.triu_indices(stages, 1)]
    overlaps = overlaps[np.isfinite(overlaps)]
    strongest = float(overlaps[np.abs(overlaps).argmax()]) if len(overlaps) else 0.0
    violations = int((facts.frozen["max_abs"] != 0).sum())
    meaning = "they undo each other" if strongest < CONFLICT else "0 is unrelated, −1 undoes, +1 is the same"
    return [
        {
            "number": f"{kept} of {len(merge)}",
            "text": "skills are not worse after the merge",
            "warn": kept < len(merge),
        },
        {
            "number": percent(share),
            "text": "is the size of the rounding error in the file, against the change",
            "warn": share > ROUNDING,
        },
        {
            "number": f"{strongest:+.2f}",
            "text": f"strongest overlap of two stages; {meaning}",
            "warn": strongest < CONFLICT,
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
