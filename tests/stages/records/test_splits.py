"""Which records are in which split, what is in none, and why."""

import json
from pathlib import Path

import datasets
import pytest

from stages.errors import MistakeError
from stages.records.record import question
from stages.records.sources.file import LocalFile
from stages.records.sources.hub import Hub

JOKES = [{"prompt": "Tell me a joke.", "completion": f"Joke {i}"} for i in range(40)]
ROWS = [{"prompt": f"q{i}", "completion": "a"} for i in range(10)]
WHERE = "params.yaml: datasets.x"


def write(rows):
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def made(rows, **keys):
    """The splits of a file with these rows, and the counts."""
    write(rows)
    return read(LocalFile(source="file", path="rows.jsonl", **keys))


def read(dataset):
    splits = dataset.splits("x", 0, WHERE)
    parts = {part: list(records) for part, records in splits.parts.items()}
    found = splits.found["x"]
    return parts, {"rows": found.rows, "empty": found.empty, "repeated": found.repeated, "other": found.other_answers}


def asked(records):
    return [question(record) for record in records]


def test_every_answer_to_a_question_is_learned():
    parts, counts = made(JOKES + ROWS, eval=3, tune=2)
    assert [len(parts[part]) for part in ("eval", "tune", "train")] == [3, 2, 45]
    assert asked(parts["train"]).count("Tell me a joke.") == 40
    assert asked(parts["train"])[:40] != ["Tell me a joke."] * 40  # as the seed shuffles them
    assert counts == {"rows": 50, "empty": 0, "repeated": 0, "other": 0}


def test_a_question_with_several_answers_is_asked_once_where_there_are_no_others():
    rows = [{"prompt": f"q{i}", "completion": f"{j}"} for i in range(6) for j in range(5)]
    parts, counts = made(rows, eval=3, tune=1)
    assert [len(parts[part]) for part in ("eval", "tune", "train")] == [3, 1, 10]
    held = asked(parts["eval"] + parts["tune"])
    assert len(set(held)) == 4 and not set(held) & set(asked(parts["train"]))
    assert counts == {"rows": 30, "empty": 0, "repeated": 0, "other": 16}


def test_what_is_empty_or_there_again_is_counted():
    empty = [{"prompt": "q", "completion": None}, {"prompt": " ", "completion": "a"}]
    again = [ROWS[0] | {"id": i} for i in range(4)]  # what is not learned does not tell two records apart
    weighted = [ROWS[0] | {"weight": 2}]
    parts, counts = made([*empty, *again, *ROWS, *weighted], eval=2)
    assert counts == {"rows": 17, "empty": 2, "repeated": 4, "other": 0}
    assert len(parts["eval"]) + len(parts["train"]) == 11
    assert "q0" in asked(parts["train"])  # for it has two answers


def test_the_first_of_each_part_does_not_depend_on_what_is_dropped():
    rows = [{"prompt": f"q{i}", "completion": "a"} for i in range(30)]
    assert made(rows, eval=5, tune=4)[0]["eval"] == made(rows, eval=5)[0]["eval"]
    assert made(rows, eval=5, train=12)[0]["train"] == made(rows, eval=5)[0]["train"][:12]


@pytest.mark.parametrize(
    ("rows", "sizes", "sentence"),
    [
        (ROWS, {"eval": 10}, "has 10 different records, but train, eval and tune together ask for 11; lower them"),
        (ROWS, {"eval": 5, "train": 6}, "has 10 different records, but train, eval and tune together ask for 11;"),
        (JOKES, {"eval": 1}, "has 40 different records of 1 questions, but train, eval and tune together ask for 2;"),
        (JOKES + ROWS, {"eval": 9, "tune": 2}, "has 50 different records of 11 questions, but train, eval and tune"),
        (
            [*ROWS, *[{"prompt": "q", "completion": ""}] * 11],
            {"eval": 1},
            "has nothing to ask or to learn in 11 of 21 rows, first in rows.jsonl line 11 (jsonl, prompts and",
        ),
    ],
)
def test_too_little_is_one_sentence(rows, sizes, sentence):
    with pytest.raises(MistakeError) as mistake:
        made(rows, **sizes)
    assert str(mistake.value).startswith(f"{WHERE} {sentence}")


def test_a_column_that_no_row_has_is_one_sentence():
    write([row | {"systm": "s"} for row in ROWS])
    columns = {"prompt": "prompt", "completion": "completion", "system": "system"}
    with pytest.raises(MistakeError, match=r"x\.columns names 'system', which no row has; did you mean systm\?"):
        read(LocalFile(source="file", path="rows.jsonl", eval=1, columns=columns))
    write([*ROWS, {"prompt": "p", "completion": "b", "system": None}])
    assert read(LocalFile(source="file", path="rows.jsonl", eval=1, columns=columns))[1]["rows"] == 11


@pytest.fixture
def stream(monkeypatch):
    """A hub dataset of given rows, streamed in their order."""

    def prepare(rows, **sizes):
        loaded = datasets.IterableDataset.from_generator(lambda: iter(rows))
        monkeypatch.setattr(loaded, "shuffle", lambda **_: loaded)
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: loaded)
        return read(Hub(source="hub", id="a/b", revision="c", stream=True, **sizes))

    return prepare


def test_a_stream_asks_as_it_comes_and_learns_every_answer(stream):
    empty = {"prompt": "", "completion": "a"}
    parts, counts = stream(
        [empty, ROWS[0], ROWS[1], *JOKES, ROWS[0], ROWS[0] | {"completion": "b"}, empty], eval=1, tune=1
    )
    assert asked(parts["eval"]) == ["q0"] and asked(parts["tune"]) == ["q1"] and len(parts["train"]) == 40
    assert counts == {"rows": 46, "empty": 2, "repeated": 1, "other": 1}


def test_a_stream_of_nothing_is_one_sentence_before_its_end(stream):
    with pytest.raises(MistakeError, match=r"datasets\.x has nothing to ask or to learn in 1000 of 1010 rows"):
        stream([*ROWS, *[{"prompt": "q", "completion": None}] * 5000], eval=3)


def test_no_chat_of_train_asks_a_question_of_eval_on_its_way():
    def chat(*texts):
        return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}

    rows = [chat(f"q{i}", f"a{i}") for i in range(20)] + [chat(f"q{i}", f"a{i}", "more", "x") for i in range(20)]
    parts, counts = made(rows, eval=8)
    held = {each["messages"][0]["content"] for each in parts["eval"] if len(each["messages"]) == 2}
    assert held and not held & {each["messages"][0]["content"] for each in parts["train"]}
    assert counts["other"] == 40 - 8 - len(parts["train"])


def test_questions_that_differ_in_spaces_at_their_ends_are_one():
    rows = [{"prompt": f"q{i}{end}", "completion": "a"} for i in range(10) for end in ("", " ", "\n")]
    parts, _ = made(rows, eval=4)
    assert not {each["prompt"].strip() for each in parts["eval"]} & {each["prompt"].strip() for each in parts["train"]}
