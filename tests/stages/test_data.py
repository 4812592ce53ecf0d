"""Sources, splits and the sentences for bad records."""

import json
from pathlib import Path

import pandas
import pytest

from stages import data, params
from stages.errors import MistakeError
from stages.records import answer, check, load_split, question

ROWS = [{"prompt": f"{i}?", "completion": str(i * i)} for i in range(30)]


def write_rows(path, rows=ROWS):
    table = pandas.DataFrame(rows)
    if path.endswith(".jsonl"):
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.endswith(".csv"):
        table.to_csv(path, index=False)
    else:
        table.to_parquet(path)


def read(path, **keys):
    dataset = params.LocalFile(source="file", path=path, **({"eval": 5} | keys))
    records = data.distinct(data.read(dataset, "0/x", "params.yaml: datasets.x"))
    splits = data.split(records, dataset, "params.yaml: datasets.x")
    return splits["train"], splits["eval"]


@pytest.mark.parametrize("path", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_the_same_rows_from_each_kind_of_file(path):
    write_rows(path)
    train, evaluation = read(path)
    assert len(evaluation) == 5 and len(train) == 25
    assert sorted((r["prompt"], r["completion"]) for r in train + evaluation) == sorted(
        (r["prompt"], r["completion"]) for r in ROWS
    )


def test_chats_from_parquet_are_plain_lists():
    chats = [[{"role": "user", "content": str(i)}, {"role": "assistant", "content": "b"}] for i in range(2)]
    write_rows("chat.parquet", [{"messages": chat} for chat in chats])
    train, evaluation = read("chat.parquet", eval=1)
    assert sorted((r["messages"] for r in train + evaluation), key=str) == chats


def test_splits_share_no_question_even_when_answers_differ():
    write_rows("rows.jsonl", ROWS + [{"prompt": row["prompt"], "completion": "other"} for row in ROWS])
    train, evaluation = read("rows.jsonl")
    assert len(train) + len(evaluation) == 30
    assert not {question(r) for r in train} & {question(r) for r in evaluation}


@pytest.mark.parametrize("train", [None, 12])
def test_a_tuning_split_shares_no_question_and_leaves_train_and_eval_as_they_are(train):
    write_rows("rows.jsonl", ROWS)
    dataset = params.LocalFile(source="file", path="rows.jsonl", eval=5, tune=4, train=train)
    splits = data.split(iter(ROWS), dataset, "")
    without = data.split(iter(ROWS), dataset.model_copy(update={"tune": 0}), "")
    assert [len(splits[part]) for part in ("train", "eval", "tune")] == [train or 21, 5, 4]
    assert len({question(record) for records in splits.values() for record in records}) == sum(
        map(len, splits.values())
    )
    assert splits["eval"] == without["eval"] and splits["train"] == without["train"][: len(splits["train"])]
    assert without["tune"] == []


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{not json", "rows.jsonl line 3 is not valid JSON"),
        ('["a"]', "rows.jsonl line 3 is no mapping"),
        ('{"question": "a"}', "rows.jsonl line 3 needs exactly one of text, prompt with completion, messages"),
        ('{"prompt": "a"}', "rows.jsonl line 3 needs completion as text"),
        ('{"prompt": "a", "completion": ""}', "rows.jsonl line 3 needs completion as text that is not empty"),
        ('{"prompt": "a", "completion": 4}', "rows.jsonl line 3 needs completion as text"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "rows.jsonl line 3 needs messages as a list of at least"),
        ('{"text": "a", "prompt": "b"}', "rows.jsonl line 3 needs exactly one of"),
        (
            '{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}',
            "needs an assistant message as its last one",
        ),
    ],
)
def test_a_bad_record_is_named_by_its_line(line, sentence):
    lines = [json.dumps(row) for row in ROWS]
    lines[2] = line
    Path("rows.jsonl").write_text("\n".join(lines))
    with pytest.raises(MistakeError) as mistake:
        read("rows.jsonl")
    assert sentence in str(mistake.value)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"path": "none.jsonl"}, "datasets.x.path 'none.jsonl' is not a file"),
        ({"path": "rows.txt"}, "is no .jsonl, .csv or .parquet file; convert it"),
        ({"path": "rows.jsonl", "train": 26}, "has 30 different records, but train, eval and tune together ask for 31"),
        ({"path": "rows.jsonl", "eval": 30}, "has 30 different records"),
    ],
)
def test_a_bad_source_is_one_sentence(keys, sentence):
    write_rows("rows.jsonl")
    Path("rows.txt").write_text("a")
    with pytest.raises(MistakeError) as mistake:
        read(**keys)
    assert sentence in str(mistake.value)


def test_a_hub_dataset_is_read_from_a_local_folder():
    Path("folder").mkdir()
    write_rows("folder/train.parquet")
    dataset = params.Hub(source="hub", id="folder", revision="main", eval=5)
    rows = list(data.read(dataset, "0/x", "params.yaml: datasets.x"))
    assert sorted(row["prompt"] for row in rows) == sorted(row["prompt"] for row in ROWS)


def test_a_hub_dataset_that_is_not_there_is_one_sentence():
    dataset = params.Hub(source="hub", id="nowhere/nothing", revision="main", eval=5)
    with pytest.raises(MistakeError, match=r"datasets.x.id 'nowhere/nothing' does not load"):
        list(data.read(dataset, "0/x", "params.yaml: datasets.x"))


def test_reasoning_gym_gives_distinct_tasks_that_its_scorer_accepts():
    import reasoning_gym

    dataset = params.ReasoningGym(
        source="reasoning_gym", task="chain_sum", config={"min_terms": 2, "max_terms": 2}, train=20, eval=10
    )
    splits = data.split(data.distinct(data.read(dataset, "0/x", "")), dataset, "")
    train, evaluation = splits["train"], splits["eval"]
    assert (len(train), len(evaluation)) == (20, 10)
    assert len({question(r) for r in train + evaluation}) == 30
    scorer = reasoning_gym.get_score_answer_fn("chain_sum")
    assert all(scorer(answer(r), r["entry"]) == 1.0 for r in train + evaluation)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"task": "no_such_task"}, "does not make task 'no_such_task'"),
        ({"task": "chain_sum", "config": {"terms": 2}}, "does not make task 'chain_sum' with this config"),
        ({"task": "aiw", "config": {"task_types": ["siblings"]}}, "does not make task 'aiw' with this config"),
    ],
)
def test_an_impossible_task_is_one_sentence(keys, sentence):
    dataset = params.ReasoningGym(source="reasoning_gym", train=5, eval=5, **keys)
    with pytest.raises(MistakeError) as mistake:
        list(data.read(dataset, "0/x", "params.yaml: datasets.x"))
    assert sentence in str(mistake.value)


def test_a_good_record_is_returned_as_it_is():
    record = {"text": "hello"}
    assert check(record, "here") is record
    assert answer(record) is None


def test_the_stage_is_repeatable_and_counts(project):
    data.main("sums")
    first = {p.name: p.read_bytes() for p in Path("data/sums").iterdir()}
    counts = json.loads(Path("reports/data/sums.json").read_text())["sums"]
    data.main("sums")
    assert first == {p.name: p.read_bytes() for p in Path("data/sums").iterdir()}
    assert (counts["train"], counts["eval"]) == (40, 10)
    assert len(load_split("sums", "train")) == 40
