"""What the evaluation says about skills kept and lost: by a later stage, or by the merge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MARGIN = 0.1  # of what was learned: a skill is kept where the loss of more is excluded
LOSS_RISE = 0.05  # of itself: the same of a guard that is told by its loss, for nothing of it was learned

WORSE, KEPT, UNCLEAR = "worse", "kept", "unclear"

Cell = dict[str, float]  # a measure and its value


@dataclass(frozen=True)
class Change:
    """One skill before and after something happened to it.

    Attributes:
        model: the row of the matrix that shows the skill afterwards: a stage or `merged`.
        dataset: the skill.
        stage: the row that shows it before: the parent of a stage; for `merged`, the stage that learned it.
        before: accuracy or another score, or loss in nats.
        after: the same afterwards.
        measure: which it is.
        verdict: WORSE, KEPT, or UNCLEAR, which no one can tell with so few questions (see `judge`).
        improved: whether it got better by more than chance explains.
        at_stake: whether it could get lost: a skill that is not there cannot be, nor be said to be kept.
        questions: how many were asked.
        needed: how many it takes to tell a difference of this size; None where there is none.
    """

    model: str
    dataset: str
    stage: str
    before: float
    after: float
    measure: str
    verdict: str
    improved: bool
    at_stake: bool
    questions: int
    needed: int | None

    @property
    def worse(self) -> bool:
        """Whether it got worse by more than chance explains."""
        return self.verdict == WORSE


def judge(compared: dict[str, Any], base: float | None) -> str:
    """Whether a skill was kept or got worse, or whether that is unclear.

    KEPT: the 95 % interval of the difference excludes the loss of more than MARGIN of what was learned; of a guard, of
    more than MARGIN of what the base has, or a rise of its loss by more than LOSS_RISE. WORSE: it excludes no loss at
    all too, and where answers are right or wrong, so does McNemar's exact test.

    Args:
        compared: one of the comparisons of reports/evaluation.json.
        base: what the base has in place of `before`; None of a guard, where `before` is the base's.
    """
    low, high = compared["interval"]
    is_loss = compared["measure"] == "loss"
    most = high if is_loss else -low
    if base is None:
        allowed = (LOSS_RISE if is_loss else MARGIN) * compared["before"]
    else:
        allowed = MARGIN * (compared["before"] - base) * (-1 if is_loss else 1)
    if most <= allowed:
        return KEPT
    return WORSE if compared["clear"] and _is_worse(compared) else UNCLEAR


def changes(evaluation: dict[str, Any]) -> list[Change]:
    """Each skill learned earlier under each later stage, then each merged stage's skill under the merge.

    Args:
        evaluation: content of reports/evaluation.json.
    """
    compared = {(each["model"], each["against"], each["dataset"]): each for each in evaluation["comparisons"]}
    found = []
    for (_, against, dataset), each in compared.items():
        if against != "base":
            learned = compared[against, "base", dataset]
            at_stake = learned["clear"] and not _is_worse(learned)
            found.append(_change(each, learned["before"], at_stake, evaluation))
    return found


def guarded(evaluation: dict[str, Any], guards: list[str]) -> list[Change]:
    """What the training did to each guard, stage by stage and in the merged model, beside the base.

    Args:
        evaluation: content of reports/evaluation.json.
        guards: datasets that no stage learns.
    """
    return [
        _change(each, None, bool(each["before"]), evaluation)
        for each in evaluation["comparisons"]
        if each["dataset"] in guards
    ]


def _change(each: dict[str, Any], base: float | None, at_stake: bool, evaluation: dict[str, Any]) -> Change:
    """One comparison as a change, judged beside `base` (see `judge`)."""
    return Change(
        model=each["model"],
        dataset=each["dataset"],
        stage=each["against"],
        before=each["before"],
        after=each["after"],
        measure=each["measure"],
        verdict=judge(each, base),
        improved=each["clear"] and not _is_worse(each),
        at_stake=at_stake,
        questions=evaluation["questions"][each["dataset"]],
        needed=each["needed"],
    )


def unclear_gains(evaluation: dict[str, Any], skills: dict[str, str]) -> dict[str, int]:
    """Stages whose gain on their own skill chance explains, and how many questions they were asked."""
    own = list(skills.items())
    return {
        each["model"]: evaluation["questions"][each["dataset"]]
        for each in evaluation["comparisons"]
        if each["against"] == "base" and (each["model"], each["dataset"]) in own and not each["clear"]
    }


def _is_worse(compared: dict[str, Any]) -> bool:
    return (compared["difference"] > 0) == (compared["measure"] == "loss") and compared["difference"] != 0
