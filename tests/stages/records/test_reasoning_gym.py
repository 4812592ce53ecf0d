"""Every task of reasoning-gym: refused in one sentence, or scored from a file as the library scores it in memory."""

import copy
import json
import time
from pathlib import Path

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from stages import data
from stages.errors import MistakeError
from stages.records.lines import load_split
from stages.records.record import answer, mark_tuples, restore_tuples
from stages.records.scorers import score_answers
from stages.records.sources.reasoning_gym import ReasoningGym
from tests.conftest import PARAMS

WITHOUT_ANSWERS = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
WITH_MARKS = {"arc_agi", "rearc"}
SECONDS = 5  # of a task that takes longer to make, nothing is asked


def records_of(task, size=1):
    return ReasoningGym(source="reasoning_gym", task=task, train=size, eval=size).records(
        "0", "params.yaml: datasets.x"
    )


def written_and_read(record):
    return json.loads(json.dumps(record, ensure_ascii=False, default=str))


def is_right(record, text):
    return score_answers(["task"], [text], [record]) == [1.0]


@pytest.mark.slow
def test_every_task_is_refused_or_scores_its_own_answers():
    outcomes, wrong = {}, {}
    for task in sorted(DATASETS):
        start = time.monotonic()
        entries = []
        if task != "composite":
            entries = list(reasoning_gym.create_dataset(task, size=2, seed=0))
        if time.monotonic() - start > SECONDS:
            outcomes[task] = "slow"
            continue
        try:
            records = records_of(task)
        except MistakeError as mistake:
            outcomes[task] = str(mistake)
            continue
        marked = any("__tuple__" in json.dumps(record, default=str) for record in records)
        outcomes[task] = "marked" if marked else "plain"
        score = reasoning_gym.get_score_answer_fn(task)
        for record in map(written_and_read, records):
            if score(answer(record), restore_tuples(record["entry"])) != 1.0 or not is_right(record, answer(record)):
                wrong[task] = record
        for entry in entries:
            untouched = copy.deepcopy(entry)
            score(str(entry["answer"]), entry)
            assert entry == untouched, task  # the records of a task are those that were made, whether scored or not
    sentences = {task: text for task, text in outcomes.items() if text not in ("slow", "marked", "plain")}
    assert not wrong
    assert set(sentences) == WITHOUT_ANSWERS | {"composite"}
    assert all(text.startswith("params.yaml: datasets.x") and "\n" not in text for text in sentences.values())
    assert {task for task, text in outcomes.items() if text == "marked"} == WITH_MARKS
    assert sum(text == "plain" for text in outcomes.values()) > 90


def test_a_task_without_answers_is_refused():
    with pytest.raises(MistakeError) as mistake:
        records_of("rubiks_cube")
    assert str(mistake.value) == (
        "params.yaml: datasets.x.task 'rubiks_cube' has questions without an answer to learn; choose another task"
    )


def make_entries(monkeypatch, score, **entry):
    monkeypatch.setattr(
        reasoning_gym,
        "create_dataset",
        lambda *_, size, **__: [{"question": str(i), "answer": "a", "metadata": {}} | entry for i in range(size)],
    )
    monkeypatch.setattr(reasoning_gym, "get_score_answer_fn", lambda _: score)


@pytest.mark.parametrize("reply", [None, "", " \n"])
def test_an_empty_answer_is_none(monkeypatch, reply):
    make_entries(monkeypatch, lambda *_: 1.0, answer=reply)
    with pytest.raises(MistakeError, match="has questions without an answer to learn"):
        records_of("chain_sum")


def test_a_scorer_that_fails_on_the_reference_is_refused(monkeypatch):
    make_entries(monkeypatch, lambda text, entry: entry["nothing"])
    with pytest.raises(MistakeError, match=r"datasets.x.task 'chain_sum' has a scorer that fails on the task's own"):
        records_of("chain_sum")


def test_a_scorer_that_no_file_serves_is_refused(monkeypatch):
    make_entries(monkeypatch, lambda text, entry: float(entry["keys"][1]), keys={1: 1})
    with pytest.raises(MistakeError, match=r"datasets.x.task 'chain_sum' has a scorer that cannot be used once"):
        records_of("chain_sum")


def test_a_wrong_answer_and_a_scorer_that_fails_on_it_are_wrong(monkeypatch):
    def score(text, entry):
        return {"a": 1.0, "b": 0.5}[text]

    make_entries(monkeypatch, score)
    record = records_of("chain_sum")[0]
    assert [is_right(record, text) for text in ("a", "b", "c")] == [True, False, False]


def test_the_scorer_has_the_word_and_not_the_reference():
    record = records_of("chain_sum")[0] | {"completion": "another"}
    assert not is_right(record, "another")
    assert is_right(record, record["entry"]["answer"])


def test_tuples_come_back_and_all_else_is_as_it_was():
    entry = {"a": (1, [2, (3, "b")]), "c": {"d": ()}, "e": [None, 1.5, True]}
    assert restore_tuples(json.loads(json.dumps(mark_tuples(entry)))) == entry
    plain = {"a": [1, {"b": [2]}], "c": "d"}
    assert mark_tuples(plain) == restore_tuples(plain) == plain


def test_a_grid_in_a_file_is_scored_as_in_memory(project):
    Path("params.yaml").write_text(
        PARAMS.replace("datasets:", "datasets:\n  grids: {source: reasoning_gym, task: rearc, train: 2, eval: 2}", 1)
    )
    data.main("grids")
    for record in load_split("grids", "eval"):
        assert is_right(record, answer(record)) and is_right(record, answer(record).replace("\n", " \n"))
        assert not is_right(record, answer(record) + " 1")
