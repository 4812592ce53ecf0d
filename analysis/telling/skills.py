"""What the evaluation matrix says about skills lost: by a later stage, or by the merge."""

from __future__ import annotations

import math
from dataclasses import dataclass

from stages.project.params import Params

LOSS_RISE = 0.05  # a skill without answers to count is worse when its loss rises by more than this share

Cell = dict[str, float]


@dataclass(frozen=True)
class Change:
    """One skill before and after something happened to it.

    Attributes:
        model: the row of the matrix that shows the skill afterwards: a stage or `merged`.
        dataset: the skill.
        stage: the row that shows it before: the parent of a stage; for `merged`, the stage that learned it.
        before: accuracy, or loss in nats where the dataset has no answers to count.
        after: the same afterwards.
        measure: `accuracy` or `loss`.
        worse: whether it got worse by more than chance (see `is_worse`).
        at_stake: whether it could have: a skill that is not there cannot be lost, nor be said to be kept.
    """

    model: str
    dataset: str
    stage: str
    before: float
    after: float
    measure: str
    worse: bool
    at_stake: bool


def is_worse(before: float, after: float, measure: str, questions: int) -> bool:
    """Whether a skill got worse by more than chance would explain.

    Accuracy: the fall exceeds two standard errors of a difference of two shares of `questions` answers,
    √((p(1−p)+q(1−q))/n). Loss: it rises by more than LOSS_RISE of itself.
    """
    if measure == "loss":
        return after > before * (1 + LOSS_RISE)
    error = math.sqrt((before * (1 - before) + after * (1 - after)) / questions)
    return before - after > 2 * error


def changes(matrix: dict[str, dict[str, Cell]], params: Params, questions: dict[str, int]) -> list[Change]:
    """Each skill learned earlier under each later stage, then each merged stage's skill under the merge.

    Args:
        matrix: of reports/evaluation.json: model, dataset, then accuracy and loss.
        params: tell who learned what, and what came after what.
        questions: number of evaluation records with an answer, by dataset.
    """
    pairs = [
        (name, params.skills[earlier], stage.parent)
        for name, stage in params.stages.items()
        for earlier in params.ancestors(name)
        if params.skills[earlier] != params.skills[name]
    ]
    pairs += [("merged", params.skills[name], name) for name in params.merge.weights]
    return [_change(matrix, *pair, questions) for pair in dict.fromkeys(pairs)]


def _change(
    matrix: dict[str, dict[str, Cell]], model: str, dataset: str, stage: str, questions: dict[str, int]
) -> Change:
    measure = "accuracy" if "accuracy" in matrix[model][dataset] else "loss"
    before, after = matrix[stage][dataset][measure], matrix[model][dataset][measure]
    lost = 0.0 if measure == "accuracy" else matrix["base"][dataset][measure]
    worse, at_stake = (is_worse(before, value, measure, questions[dataset]) for value in (after, lost))
    return Change(model, dataset, stage, before, after, measure, worse, at_stake)
