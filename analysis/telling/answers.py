"""What the models answered to the same questions, side by side, for the report and for `strata answers`.

Which questions are shown is nobody's choice: the first of each kind in the order of the evaluation split, which was
fixed before anything was trained.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from stages.files import REPORTS

ANSWERS = REPORTS / "answers.parquet"
SAME = 0.05  # scores that differ by less are alike: a word more or less moves chrF by about as much
RIGHT = 0.5  # score from which an answer is not called wrong
KINDS = ["worse", "lost", "better", "unchanged"]  # what is wrong goes first


@dataclass(frozen=True)
class Answer:
    """What a model said, and its score from 0 to 1."""

    model: str
    text: str
    score: float


@dataclass(frozen=True)
class Question:
    """A record of an evaluation split, and what the models say to it.

    Attributes:
        record: its place in eval.jsonl.
        text: what the models were asked.
        reference: the right answer, where there is one.
        answers: of two models at least, in the order in which they are told.
    """

    record: int
    text: str
    reference: str | None
    answers: list[Answer]

    @property
    def kind(self) -> str:
        """What became of it from the first model to the last: worse, better, or unchanged where they differ by less
        than SAME; `lost` where it is not worse, and a model between the two did better than the last.
        """
        first, *between, last = (answer.score for answer in self.answers)
        if last <= first - SAME:
            return "worse"
        if max(between, default=0.0) >= last + SAME:
            return "lost"
        return "better" if last >= first + SAME else "unchanged"

    @property
    def is_wrong(self) -> bool:
        """Whether the last model's answer scores below RIGHT."""
        return self.answers[-1].score < RIGHT


def speakers(dataset: str, skills: dict[str, str]) -> list[str]:
    """The models that are told of a dataset: base, the stages that learned it, merged.

    Args:
        dataset: its name.
        skills: the dataset of each stage.
    """
    return ["base", *(stage for stage, skill in skills.items() if skill == dataset), "merged"]


def side_by_side(table: pd.DataFrame, dataset: str, models: list[str]) -> list[Question]:
    """The records of a dataset to which all these models have an answer with a score, in the order of the split.

    Args:
        table: reports/answers.parquet, one row for each record and model.
        dataset: its name.
        models: two at least.
    """
    rows = table[(table["dataset"] == dataset) & table["model"].isin(models)].dropna(subset=["answer", "score"])
    texts, scores = (rows.pivot(index="record", columns="model", values=each) for each in ("answer", "score"))
    whole = scores.reindex(columns=models).dropna().index
    asked = rows.drop_duplicates("record").set_index("record")
    return [
        Question(
            record=record,
            text=asked.at[record, "question"],
            reference=None if pd.isna(asked.at[record, "reference"]) else asked.at[record, "reference"],
            answers=[Answer(model, texts.at[record, model], float(scores.at[record, model])) for model in models],
        )
        for record in whole.tolist()
    ]


def by_kind(questions: list[Question]) -> dict[str, list[Question]]:
    """The questions of each kind, in the order of KINDS; a kind without one is left out."""
    kinds = {kind: [each for each in questions if each.kind == kind] for kind in KINDS}
    return {kind: each for kind, each in kinds.items() if each}


def counts(questions: list[Question]) -> str:
    """How many there are of each kind, such as `100 questions; from base to merged 65 better, 35 unchanged`."""
    models = [answer.model for answer in questions[0].answers]
    names = {"lost": f"lost after {', '.join(models[1:-1])}"}
    told = [f"{len(each)} {names.get(kind, kind)}" for kind, each in by_kind(questions).items()]
    plural = "s" if len(questions) > 1 else ""
    return f"{len(questions):,} question{plural}; from {models[0]} to {models[-1]} {', '.join(told)}"


def mark(score: float) -> str:
    """A score in a word or a number."""
    return {0.0: "wrong", 1.0: "right"}.get(score, f"{score:.2f}")
