"""What the models answer to the questions of a skill, side by side: `strata answers SKILL`."""

from argparse import ArgumentParser

import pandas as pd

from analysis.telling.answers import ANSWERS, KINDS, Question, by_kind, counts, mark, side_by_side, speakers
from stages.errors import MistakeError
from stages.project.params import load_params
from stages.settings.section import nearest
from tools.terminal import positive, visible

WRONG = "wrong"


def add_arguments(parser: ArgumentParser) -> None:
    """Which skill, which models, and which of the questions."""
    parser.add_argument("skill", help="a dataset of params.yaml with answers")
    parser.add_argument(
        "--models",
        help="two or more, with commas, the last of which is compared with the first; base, the stages that learned the"
        " skill and merged by default",
    )
    parser.add_argument(
        "--only",
        choices=[*KINDS, WRONG],
        help="questions of one kind: lost is what a model between the first and the last did better than the last,"
        " wrong is what the last one does not know",
    )
    parser.add_argument("--count", type=positive, default=3, help="questions of each kind; 3 by default")


def main(skill: str, models: str | None, only: str | None, count: int) -> None:
    """Print the first questions of each kind, in the order of the evaluation split, with what the models say.

    Raises:
        MistakeError: there is no such skill or model, or nothing to show of it.
    """
    settings = load_params()
    settings.find("datasets", skill)
    if not ANSWERS.exists():
        raise MistakeError(f"{ANSWERS} is missing; run dvc repro evaluate")
    table = pd.read_parquet(ANSWERS)
    chosen = _listed(models, list(table["model"].unique())) if models else speakers(skill, settings.skills)
    questions = side_by_side(table, skill, chosen)
    if not questions:
        raise MistakeError(
            f"{ANSWERS} has no answers to {skill!r} with a score of {', '.join(chosen)}; name a dataset whose records"
            " have answers, or run dvc repro evaluate if it is new"
        )
    print(counts(questions))
    kinds = {WRONG: [each for each in questions if each.is_wrong]} if only == WRONG else by_kind(questions)
    for kind, each in kinds.items():
        if only in (None, kind):
            for question in each[:count]:
                print(f"\n{kind}, record {question.record}\n{_told(question)}")


def _listed(models: str, known: list[str]) -> list[str]:
    listed = list(dict.fromkeys(name.strip() for name in models.split(",")))
    for name in listed:
        if name not in known:
            raise MistakeError(f"--models: {ANSWERS} has no {name!r}; {nearest(name, known)}")
    if len(listed) < 2:
        raise MistakeError(f"--models names {listed[0]} alone; name two, such as base,{listed[0]}")
    return listed


def _told(question: Question) -> str:
    parts = {"question": question.text} | ({"reference": question.reference} if question.reference is not None else {})
    parts |= {f"{answer.model}, {mark(answer.score)}": answer.text for answer in question.answers}
    return "\n".join(f"  {name}\n{_indented(text)}" for name, text in parts.items())


def _indented(text: str) -> str:
    """A text on lines of its own, so that nothing has to line up beside a script of any width."""
    return "\n".join(f"    {visible(line)}" for line in text.split("\n"))
