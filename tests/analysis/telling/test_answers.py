"""Answers side by side: which questions are shown, and that any text comes out as it was written."""

import html
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from analysis.telling.answers import Answer, Question, by_kind, counts, side_by_side, speakers
from stages.errors import MistakeError
from tools import answers

RUSSIAN, CHINESE, ARABIC = "Как вернуть товар?", "如何退货？\n请打开“我的订单”", "كيف أعيد المنتج (Return)؟"


def asked(*scores, record=1):
    models = ["base", *(f"stage{number}" for number in range(len(scores) - 2)), "merged"]
    return Question(record, "q", "r", [Answer(model, "a", score) for model, score in zip(models, scores, strict=True)])


@pytest.mark.parametrize(
    ("scores", "kind"),
    [
        ((0.0, 1.0, 1.0), "better"),
        ((0.0, 1.0, 0.0), "lost"),
        ((0.0, 1.0, 0.5), "lost"),  # though it is better than the base's
        ((1.0, 1.0, 0.0), "worse"),  # and not told twice
        ((1.0, 0.0, 1.0), "unchanged"),
        ((0.40, 0.40, 0.44), "unchanged"),
        ((0.0, 0.0, 1.0, 0.0), "lost"),  # of two stages that learned the skill, one knew it
        ((0.0, 1.0), "better"),
        ((0.5, 0.4), "worse"),
    ],
)
def test_a_question_is_of_one_kind(scores, kind):
    assert asked(*scores).kind == kind


def test_kinds_are_counted_and_what_is_wrong_goes_first():
    questions = [asked(*scores) for scores in [(0, 1, 1)] * 3 + [(1, 1, 0)] + [(0, 1, 0)] * 2]
    assert [(kind, len(each)) for kind, each in by_kind(questions).items()] == [
        ("worse", 1),
        ("lost", 2),
        ("better", 3),
    ]
    assert counts(questions) == "6 questions; from base to merged 1 worse, 2 lost after stage0, 3 better"


def table(*rows):
    columns = ["dataset", "record", "model", "question", "reference", "answer", "score"]
    return pd.DataFrame(rows, columns=columns)


def test_only_records_that_all_models_answered_are_compared():
    rows = [("d", 2, model, "two", None, "x", 1.0) for model in ("merged", "base")]
    rows += [("d", 1, model, "one", "r", f"of {model}", 0.5) for model in ("merged", "other", "base")]
    rows += [("d", 3, "base", "three", "r", "x", 1.0), ("d", 3, "merged", "three", "r", None, float("nan"))]
    rows += [("e", 1, model, "e", "r", "x", 1.0) for model in ("base", "merged")]
    one, two = side_by_side(table(*rows), "d", ["base", "merged"])
    assert (one.record, one.text, one.reference, two.record, two.reference) == (1, "one", "r", 2, None)
    assert one.answers == [Answer("base", "of base", 0.5), Answer("merged", "of merged", 0.5)]
    assert side_by_side(table(*rows), "nothing", ["base", "merged"]) == []


def test_a_guard_is_told_of_the_base_and_the_merged_model():
    assert speakers("sums", {"one": "sums", "two": "words", "three": "sums"}) == ["base", "one", "three", "merged"]
    assert speakers("guard", {"one": "sums"}) == ["base", "merged"]


def record(question, reference, **said):
    return {"question": question, "reference": reference, **said}


@pytest.fixture
def answered(project):
    """Three skills: sums in numbers, names in other scripts, prose without answers."""
    known = {"base": ("?", 0.0), "sums": ("5", 1.0)}
    sums = [record(f"{n} + {5 - n}", "5", **known, merged=("5", 1.0) if n else ("\x1b[31m7", 0.0)) for n in range(6)]
    names = [
        record(text, text * 20, base=("<b>no</b>\n& no", 0.1), names=(text * 20, 1.0), merged=(text, 0.4))
        for text in (RUSSIAN, CHINESE, ARABIC)
    ]
    none = (None, float("nan"))
    project.answers({"sums": sums, "names": names, "prose": [record("text", None, base=none, prose=none, merged=none)]})
    project.merge()
    project.evaluation()
    return project


class Told(HTMLParser):
    """The texts of a page that were written by a model or a user, and the direction of each."""

    def __init__(self):
        super().__init__()
        self.found, self.inside = [], False

    def handle_starttag(self, tag, attributes):
        self.inside = ("class", "said") in attributes
        if self.inside:
            assert ("dir", "auto") in attributes
            self.found.append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, text):
        if self.inside:
            self.found[-1] += text


def test_the_page_tells_any_text_as_it_was_written(answered):
    answered.report()
    page = Path("reports/report.html").read_text(encoding="utf-8")
    told = Told()
    told.feed(page)
    assert {"<b>no</b>\n& no", RUSSIAN, CHINESE, ARABIC, *(text * 20 for text in (RUSSIAN, CHINESE, ARABIC))} <= set(
        told.found
    )
    assert (RUSSIAN * 20)[:240] + " …" in told.found  # and the whole of it in the fold
    assert "6 questions; from base to merged 1 lost after sums, 5 better" in html.unescape(page)
    kinds = re.findall(r"<summary>(\w+: .*\d)</summary>", page)
    assert kinds == ["lost: 1", "better: the first 3 of 5", "lost: 3"]
    assert "<b>prose</b>" not in page


def test_without_answers_there_is_no_such_section(project):
    project.merge()
    project.evaluation()
    project.report()
    assert "Answers side by side" not in Path("reports/report.html").read_text(encoding="utf-8")


def printed(capsys, skill="sums", models=None, only=None, count=3):
    answers.main(skill, models, only, count)
    return capsys.readouterr().out


def test_the_command_shows_the_first_of_each_kind(answered, capsys):
    text = printed(capsys, count=2)
    assert re.findall(r"^(\w+), record (\d)$", text, re.MULTILINE) == [("lost", "1"), ("better", "2"), ("better", "3")]
    assert "  question\n    1 + 4\n  reference\n    5\n  base, wrong\n    ?\n  sums, right\n    5\n" in text
    assert "\\x1b[31m7" in text and "\x1b" not in text
    assert "如何退货？\n    请打开" in printed(capsys, "names")


@pytest.mark.parametrize(
    ("models", "only", "shown"),
    [
        (None, "wrong", [("wrong", "1")]),
        (None, "lost", [("lost", "1")]),
        (None, "worse", []),
        ("sums,merged", "worse", [("worse", "1")]),
        ("base,sums", "better", [("better", number) for number in "123"]),
    ],
)
def test_the_command_shows_what_is_asked_for(answered, capsys, models, only, shown):
    text = printed(capsys, models=models, only=only)
    assert re.findall(r"^(\w+), record (\d)$", text, re.MULTILINE) == shown


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"skill": "sum"}, "datasets has no 'sum'; it has sums, names, prose"),
        ({"skill": "prose"}, "has no answers to 'prose' with a score of base, prose, merged"),
        ({"models": "base,mergd"}, "has no 'mergd'; did you mean merged?"),
        ({"models": "merged"}, "names merged alone; name two, such as base,merged"),
    ],
)
def test_what_there_is_not_is_one_sentence(answered, capsys, words, sentence):
    with pytest.raises(MistakeError, match=re.escape(sentence)):
        printed(capsys, **words)


def test_a_project_that_has_not_run_is_one_sentence(project, capsys):
    Path("reports/answers.parquet").unlink()
    with pytest.raises(MistakeError, match=r"answers.parquet is missing; run dvc repro evaluate"):
        printed(capsys)
