"""The report in words: a headline of facts, guesses apart from them, and four numbers to see first.

A sentence follows from a comparison with its null: with chance, with what rounding alone makes, or with what was there
to be lost. Where there is nothing to compare, there is no sentence.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

from analysis.changes.measured import KEYS
from analysis.changes.tables import cosine_by_chance, significant, summarise
from analysis.telling.facts import Facts
from analysis.telling.skills import KEPT, UNCLEAR, Change, unclear_gains
from analysis.telling.text import in_layers, percent, score, scored, whole_percent
from stages.models.architecture import OUTSIDE

SENTENCES = 5
SHIFT = 0.15  # of a stage's change; one of which no more is missing is there in full
NORMS = r"norm|ln_"  # in the names of normalisations
LISTED = 4  # skills in one sentence
HALF = 0.5  # of a stage's gain; a merge that keeps less has lost the skill rather than some of it


class Sentence(NamedTuple):
    """A sentence of the headline, and the section of the report that shows it."""

    text: str
    section: int


def headline(facts: Facts) -> list[Sentence]:
    """At most five sentences of fact, for a reader who knows no mathematics; what is wrong goes before what is well."""
    skills = _cite(1, [_learned(facts), *_later(facts), *_merge(facts), *guards(facts.guarded)])
    touched, rounded_away = _touched(facts), _rounded_away(facts)
    wrong = [
        *_cite(5, touched),
        *_cite(4, _conflicts(facts) + _same_start(facts)),
        *_cite(3, (rounded_away or _moved_by_rounding(facts)) + _missing(facts) + _shifted(facts)),
        *_cite(2, _norms(facts)),
    ]
    well = [] if rounded_away else _cite(3, _rounding(facts))
    well += _cite(5, ["Nothing outside the declared layers changed."] if facts.declared and not touched else [])
    return [*skills, *wrong, *well][:SENTENCES]


def _cite(section: int, texts: list[str]) -> list[Sentence]:
    return [Sentence(text, section) for text in texts]


def _learned(facts: Facts) -> str:
    unclear, skills = unclear_gains(facts.evaluation, facts.settings.skills), []
    for name in facts.settings.stages:
        measure = facts.retention[name]["measure"]
        before, after = (facts.matrix[model][facts.settings.skills[name]][measure] for model in ("base", name))
        doubt = f" (unclear with {_questions(unclear[name])})" if name in unclear and before != after else ""
        skills.append(f"{name} went {_from_to(before, after, measure)}{doubt}")
    return f"On the skill that it was trained on, {'; '.join(skills)}."


def _later(facts: Facts) -> list[str]:
    later = [change for change in facts.changed if change.model != "merged"]
    told = {change: f"{change.model} took {_went(change)}" for change in later}
    return _verdict(
        told, "Later stages harmed earlier skills", "Later stages kept earlier skills", "Unclear under later stages"
    )


def _merge(facts: Facts) -> list[str]:
    merge = [change for change in facts.changed if change.model == "merged"]
    told = {change: (_extent(facts, change) if change.worse else "") + _went(change) for change in merge}
    return _verdict(
        told,
        "The merge lost part of what the stages had learned",
        "The merge kept what was learned",
        "Unclear in the merge",
    )


def guards(changed: list[Change]) -> list[str]:
    """What the merged model has lost of the datasets that no stage learns; the matrix shows which stage did it."""
    told = {change: _went(change) for change in changed if change.model == "merged"}
    improved = [text for change, text in told.items() if change.improved]
    parts = _verdict(
        {change: text for change, text in told.items() if not change.improved},
        "The training harmed what no stage learns",
        "The training left alone what no stage learns",
        "Unclear of what no stage learns",
    )
    parts += [f"The training improved what no stage learns: {_listed(improved)}."] if improved else []
    return [" ".join(parts)] if parts else []


def _verdict(told: dict[Change, str], worse: str, kept: str, unclear: str) -> list[str]:
    """What was lost, or kept if nothing was, and of what neither can be told with so few questions."""
    lost = [text for change, text in told.items() if change.worse]
    held = [text for change, text in told.items() if change.verdict == KEPT and change.at_stake]
    doubts = [f"{text} {_doubt(c)}" for c, text in told.items() if c.verdict == UNCLEAR and c.at_stake]
    parts = [f"{worse}: {_listed(lost)}."] if lost else [f"{kept}: {_listed(held)}."] if held else []
    parts += [f"{unclear}: {_listed(doubts)}."] if doubts else []
    return [" ".join(parts)] if parts else []


def _listed(texts: list[str]) -> str:
    more = len(texts) - LISTED
    return "; ".join(texts[:LISTED]) + (f"; and {more} more" if more > 0 else "")


def _doubt(change: Change) -> str:
    """How many questions were too few, and how many would tell such a difference."""
    more = f"; to tell a difference of this size takes about {_round(change.needed)}" if change.needed else ""
    return f"({_questions(change.questions)}{more})"


def _questions(count: int) -> str:
    return f"{count:,} question{'s' if count > 1 else ''}"


def _round(count: int) -> str:
    """Two digits of a number are all that is known of it."""
    return f"{float(f'{count:.2g}'):,.0f}"


def _extent(facts: Facts, change: Change) -> str:
    retention = facts.retention[change.stage]["retention"]
    return "most of " if retention is not None and retention < HALF else ""


def _went(change: Change) -> str:
    return f"{change.dataset} {_from_to(change.before, change.after, change.measure)}"


def _from_to(before: float, after: float, measure: str) -> str:
    if measure not in ("loss", "score"):
        return f"from {scored(before, measure)} to {score(after, measure)}"
    digits = 2  # as many as it takes to see a difference
    while before != after and digits < 5 and round(before, digits) == round(after, digits):
        digits += 1
    return f"from a {measure} of {before:.{digits}f} to {after:.{digits}f}"


def _touched(facts: Facts) -> list[str]:
    """Checkpoints whose frozen check is not 0, which it is to the bit where nothing was touched."""
    bad = facts.frozen[facts.frozen["max_abs"] != 0]
    if not len(bad):
        return []
    return [f"Something changed that was declared untouched: see the check of {', '.join(bad['checkpoint'])}."]


def _conflicts(facts: Facts) -> list[str]:
    """Pairs of stages whose changes point in opposite directions; the null of `Facts.conflicts` is chance."""
    pairs = [f"{one} and {other} (cosine {angle:+.2f})" for (one, other), angle in facts.conflicts.items()]
    if not pairs:
        return []
    return [f"Stages undo each other, for their changes point in opposite directions: {', '.join(pairs)}."]


def _same_start(facts: Facts) -> list[str]:
    """Pairs of stages that read the same directions, as those do whose random matrices came from one seed.

    Stages of which it is known that they had two seeds did not, however alike their data made them: in a narrow model
    that is much. Of others, such as two imports, the null is the overlap of random subspaces of these sizes: what
    counts is how far it is from their mean on the way to 1, and that it is beyond their spread; that of one matrix, for
    the matrices of a layer read the same and are no independent draws.
    """
    columns = ["reads", "reads_by_chance", "reads_spread"]
    table = facts.measured.pairs.groupby(["first", "second"], sort=False)[columns].median()
    share, beyond = facts.settings.warn.same_start, significant(max(1, len(table)))
    pairs = [
        f"{first} and {second} (overlap {row.reads:.2f}, by chance {row.reads_by_chance:.2f} ± {row.reads_spread:.2f})"
        for (first, second), row in table.iterrows()
        if not _had_two_seeds(facts, first, second)
        and row.reads - row.reads_by_chance > max(share * (1 - row.reads_by_chance), beyond * row.reads_spread)
    ]
    if not pairs:
        return []
    return [
        "Stages read the same directions, as those do that start from one seed, so that agreement between them says"
        f" nothing about what they learned: {', '.join(pairs)}."
    ]


def _had_two_seeds(facts: Facts, first: str, second: str) -> bool:
    one, other = (facts.records[name].get("seed") for name in (first, second))
    return one is not None and other is not None and one != other


def _rounded_away(facts: Facts) -> list[str]:
    """Stages whose change rounding to the file's dtype takes away, if it were added to the base alone.

    The null is what rounding does to the base without the change, so that a base with more digits than the file, all of
    whose numbers are rounded, is no loss of the change.
    """
    shares = facts.whole.loc[facts.merged_stages, "lost_to_rounding"]
    lost = shares[shares > facts.settings.warn.lost]
    if not facts.has_file or not len(lost):
        return []
    stages = ", ".join(f"{name} ({whole_percent(share)} of it)" for name, share in lost.items())
    return [f"Rounding to {_and_what_keeps_it(facts, f'takes away what a stage changed: {stages}')}."]


def _moved_by_rounding(facts: Facts) -> list[str]:
    """Rounding that moves the running model too far beside the merge, whatever it does to the norms."""
    if not facts.moved_by_rounding > facts.settings.warn.rounding:
        return []
    told = f"moves what the merged model says {whole_percent(facts.moved_by_rounding)} as far as the whole merge does"
    return [f"Rounding to {_and_what_keeps_it(facts, told)}."]


def _and_what_keeps_it(facts: Facts, told: str) -> str:
    """What rounding does, between the dtype and what to do about it."""
    dtype, rounding = facts.settings.merge.dtype, facts.settings.merge.rounding
    if dtype == "float32":
        return f"{dtype} {told}"
    advice = "leave `merge.rounding` stochastic" if rounding == "nearest" else "store the file as float32"
    return f"{dtype} {told}; {advice}"


def _rounding(facts: Facts) -> list[str]:
    """What rounding does to the merged change, beside that change as the method made it, before it was rounded.

    What the method left of the stages' changes is the method's: it is no part of either.
    """
    merged, dtype = facts.whole.loc["merged"], facts.settings.merge.dtype
    if not facts.has_file or not math.isfinite(merged.floor_share):
        return []
    if not merged.floor_share:
        return [f"Storing the merged model as {dtype} loses nothing of the change."]
    lost = whole_percent(merged.lost_to_rounding)
    moved = facts.moved_by_rounding
    said = f" It moves what the model says {percent(moved)} as far as the merge does." if math.isfinite(moved) else ""
    return [
        f"Storing the merged model as {dtype} rounds its weights: {lost} of the change is"
        f" lost, the rounding error is {percent(merged.floor_share)} of its size, and {percent(merged.rounded_away)} of"
        f" the numbers that the merge moves are stored as if it had not.{said}"
    ]


def _survivals(facts: Facts) -> dict[str, float]:
    """Survival of each merged stage as a share of the weight that the merge was asked for, where that is one number."""
    survivals, weights = facts.survivals["survival"], facts.settings.merge.weights
    return {n: survivals[n] / w for n, w in weights.items() if isinstance(w, int | float) and w and n in survivals}


def _asked(facts: Facts) -> dict[str, float]:
    """What the method itself gives a stage, as a share of its weight, where that is one number for every entry.

    Task arithmetic gives it all; `linear` averages over the stages that change a tensor, and a weakening beyond that is
    made by those that do not (`participants: all`). Methods that trim, vote or turn decide entry by entry.
    """
    merge, rows = facts.settings.merge, facts.measured.rows
    weights = {name: weight for name, weight in merge.weights.items() if isinstance(weight, int | float)}
    plain = len(weights) == len(merge.weights) and not merge.parameters and isinstance(merge.depth_scaling, int | float)
    if merge.method not in ("task_arithmetic", "linear") or not plain:
        return {}
    stages = rows[rows["stage"].isin(weights)]
    stages = stages.assign(weight=stages["stage"].map(weights))
    total = stages.groupby(KEYS[1:])["weight"].transform("sum") if merge.method == "linear" else 1.0
    energy = stages["delta_squared"].groupby(stages["stage"]).sum()
    given = (stages["delta_squared"] * merge.depth_scaling / total).groupby(stages["stage"]).sum()
    return (given / energy).to_dict()


def _missing(facts: Facts) -> list[str]:
    """Stages of which the merge holds less than `warn.kept` of what its method would give them (`_asked`)."""
    limit, asked = facts.settings.warn.kept, _asked(facts)
    lost = [
        f"{whole_percent(share)} of {name}"
        for name, share in _survivals(facts).items()
        if share < limit * asked.get(name, -math.inf)
    ]
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
    """Normalisations whose gain moved by more than `warn.norm` of its size.

    The null is how far, for their size, the stage moved its weight matrices: where these moved further, the norm is not
    what stands out. A stage that was to train norms alone has nothing else to move.
    """
    rows, limit = facts.measured.inside, facts.settings.warn.norm
    judged = [name for name in facts.changing if not _trains_norms_alone(facts, name)]
    weights = rows[rows["stage"].isin(judged) & rows["parameter"].eq("weight")]
    is_norm = weights["module"].str.contains(NORMS)
    matrices = summarise(weights[~is_norm], ["stage"]).set_index("stage")["relative_change"]
    norms = summarise(weights[is_norm], KEYS)
    beside = matrices.reindex(norms["stage"]).fillna(0.0).clip(lower=limit).to_numpy()
    moved = norms[norms["relative_change"] > beside]
    if not len(moved):
        return []
    count = len(moved.drop_duplicates(KEYS[1:]))
    furthest = moved.loc[moved["relative_change"].idxmax()]
    return [
        f"{count} norm{'s' if count > 1 else ''} moved by more than {percent(limit)} of the gain, which scales all that"
        f" a layer reads; the furthest is {furthest['module']} of layer {furthest['layer']} in {furthest['stage']}, by"
        f" {percent(furthest['relative_change'])}."
    ]


def _trains_norms_alone(facts: Facts, name: str) -> bool:
    stage = facts.settings.stages[name]
    named = list(stage.layers) if isinstance(stage.layers, dict) else [stage.method]
    return all(re.search(f"{NORMS}|^ln$", each) for each in named)


def guesses(facts: Facts) -> list[str]:
    """Explanations that fit the facts but were not measured.

    None where no skill was harmed by more than chance, or where one stage alone changed something: no other could have
    shifted what it reads.
    """
    if not any(change.worse for change in facts.changed) or len(facts.changing) < 2:
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
        " Training again with more replay, smaller merge weights or other layers would show whether that is the cause;"
        " a router (routers in params.yaml) gives each prompt one stage alone."
    ]


def cards(facts: Facts) -> list[dict[str, Any]]:
    """At most four numbers to see first; `warn` marks those that ask for a look."""
    return [*_skills_card(facts), *_rounding_card(facts), *_overlap_card(facts), *_frozen_card(facts)]


def _card(number: str, text: str, warn: bool) -> list[dict[str, Any]]:
    return [{"number": number, "text": text, "warn": warn}]


def _skills_card(facts: Facts) -> list[dict[str, Any]]:
    merge = [change for change in facts.changed if change.model == "merged" and (change.at_stake or change.worse)]
    verdicts = [change.verdict for change in merge]
    unclear = f"; {verdicts.count(UNCLEAR)} unclear" if UNCLEAR in verdicts else ""
    text = f"skills are kept in the merge{unclear}"
    return _card(f"{verdicts.count(KEPT)} of {len(merge)}", text, any(c.worse for c in merge)) if merge else []


def _rounding_card(facts: Facts) -> list[dict[str, Any]]:
    """What of the merged change is lost, beside that change as the method made it: see `_rounding`."""
    share = facts.whole.loc["merged", "lost_to_rounding"]
    if not facts.has_file or not math.isfinite(share):
        return []
    text = "of the merged change is lost to rounding in the file"
    return _card(whole_percent(share), text, share > facts.settings.warn.rounding)


def _overlap_card(facts: Facts) -> list[dict[str, Any]]:
    """The cosine furthest from 0, beside the standard deviation by chance; it warns of `Facts.conflicts` alone."""
    if not facts.cosines:
        return []
    cosines = facts.conflicts or facts.cosines
    pair = max(cosines, key=lambda each: abs(cosines[each]))
    chance = cosine_by_chance(facts.measured.rows, *pair)
    meaning = "they undo each other" if facts.conflicts else "0 is unrelated, −1 undoes, +1 is the same"
    text = f"strongest overlap of two stages, by chance 0 ± {chance:.2f}; {meaning}"
    return _card(f"{cosines[pair]:+.2f}", text, bool(facts.conflicts))


def _frozen_card(facts: Facts) -> list[dict[str, Any]]:
    """See `_touched`."""
    violations = int((facts.frozen["max_abs"] != 0).sum())
    text = "checkpoints changed what they declared untouched"
    return _card(str(violations), text, violations > 0) if len(facts.frozen) else []


def label(facts: Facts, name: str) -> str:
    """What a row of the matrix is, in a few words."""
    if name == "merged":
        return f"{facts.settings.merge.method}, {facts.settings.merge.dtype}"
    if name == "base":
        return "before training"
    if name in facts.settings.routers:
        return f"chooses {', '.join(facts.settings.routers[name].stages)} or base"
    stage = facts.settings.stages[name]
    return f"{stage.method}, {facts.trained(name)}, on {stage.parent}"
