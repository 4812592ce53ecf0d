"""Sources, splits and the sentences for bad records."""

import itertools
import json
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import datasets
import pandas
import pytest

from stages import data
from stages.errors import MistakeError
from stages.files import sha256
from stages.project.params import load_params
from stages.records.lines import load_split
from stages.records.record import answer, check, question
from stages.records.sources import hub
from stages.records.sources.file import LocalFile
from stages.records.sources.hub import Hub
from stages.records.sources.reasoning_gym import ReasoningGym
from tests.conftest import PARAMS, ROOT, make_tokenizer
from tools.show import main as show

ROWS = [{"prompt": f"{i}?", "completion": str(i * i)} for i in range(30)]


def write_rows(path, rows=ROWS):
    table = pandas.DataFrame(rows)
    if path.endswith(".jsonl"):
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        table.to_parquet(path)


def read(path, **keys):
    dataset = LocalFile(source="file", path=path, **({"eval": 5} | keys))
    splits = make(dataset)
    return splits["train"], splits["eval"]


def make(dataset, name="x"):
    splits = dataset.splits(name, 0, f"params.yaml: datasets.{name}")
    return {split: list(records) for split, records in splits.parts.items()}


def test_rows_are_shuffled_by_seed_and_name_and_the_ends_are_eval_and_tune():
    write_rows("rows.jsonl", [*ROWS, *ROWS])
    shuffled = [*ROWS, *ROWS]
    random.Random("0/x").shuffle(shuffled)
    order = list({row["prompt"]: row for row in shuffled}.values())
    dataset = LocalFile(source="file", path="rows.jsonl", eval=5, tune=4, train=20)
    assert make(dataset) == {"eval": order[:5], "tune": order[-4:], "train": order[5:25]}


def test_splits_share_no_question_even_when_answers_differ():
    write_rows("rows.jsonl", ROWS + [{"prompt": row["prompt"], "completion": "other"} for row in ROWS])
    train, evaluation = read("rows.jsonl")
    assert (len(train), len(evaluation)) == (2 * 25, 5)
    assert not {question(r) for r in train} & {question(r) for r in evaluation}


@pytest.mark.parametrize("train", [None, 12])
def test_a_tuning_split_shares_no_question_and_leaves_train_and_eval_as_they_are(train):
    write_rows("rows.jsonl")
    keys = {"source": "file", "path": "rows.jsonl", "eval": 5, "train": train}
    splits, without = make(LocalFile(tune=4, **keys)), make(LocalFile(**keys))
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
        ('{"question": "a"}', "rows.jsonl line 3 has the columns question, which are no known shape"),
        ('{"prompt": "a"}', "rows.jsonl line 3 has the columns prompt, which are no known shape"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "rows.jsonl line 3 needs messages as a list of at least"),
        ('{"text": "a", "prompt": "b"}', "rows.jsonl line 3 has two shapes in one record"),
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
        ({"path": "none.jsonl"}, "datasets.x.path 'none.jsonl' is not there"),
        ({"path": "rows.txt"}, "datasets.x.path 'rows.txt' is no .jsonl"),
        ({"path": "rows.jsonl", "train": 26}, "has 30 different records, but train, eval and tune together ask for 31"),
        ({"path": "rows.jsonl", "eval": 30}, "has 30 different records"),
        ({"path": "rows.jsonl", "sha256": "abc"}, "datasets.x.sha256 is not that of rows.jsonl; if it was meant to"),
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
    dataset = Hub(source="hub", id="folder", revision="main", eval=5)
    splits = make(dataset)
    assert [len(splits[split]) for split in ("train", "eval", "tune")] == [25, 5, 0]
    rows = splits["train"] + splits["eval"]
    assert sorted(row["prompt"] for row in rows) == sorted(row["prompt"] for row in ROWS)


def test_a_hub_dataset_that_is_not_there_is_one_sentence():
    dataset = Hub(source="hub", id="nowhere/nothing", revision="main", eval=5)
    with pytest.raises(MistakeError, match=r"datasets.x.id 'nowhere/nothing' does not load"):
        make(dataset)


def test_reasoning_gym_gives_distinct_tasks_that_its_scorer_accepts():
    import reasoning_gym

    dataset = ReasoningGym(
        source="reasoning_gym", task="chain_sum", config={"min_terms": 2, "max_terms": 2}, train=20, eval=10
    )
    splits = make(dataset)
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
    dataset = ReasoningGym(source="reasoning_gym", train=5, eval=5, **keys)
    with pytest.raises(MistakeError) as mistake:
        make(dataset)
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
    assert (counts["train"], counts["eval"]) == (40, 10) == (counts["train_answers"], counts["eval_answers"])
    assert len(load_split("sums", "train")) == 40


def test_the_report_says_what_was_read_and_what_of_it_is_in_no_split(project):
    lines = Path("sums.jsonl").read_text().splitlines()
    empty, other = '{"prompt": "q", "completion": null}', lines[0].replace('"0"}', '"zero"}')
    Path("sums.jsonl").write_text("\n".join([*lines, empty, *lines[:3], other]))
    data.main("sums")
    report = json.loads(Path("reports/data/sums.json").read_text())["sums"]
    assert [report[key] for key in ("rows", "empty", "repeated", "other_answers")] == [105, 1, 3, 0]
    assert report["first_empty"] == "sums.jsonl line 101"
    assert report["read"] == {"sums": "jsonl, prompts and completions (prompt, completion)"}


def test_a_file_that_its_hash_pins_is_read():
    write_rows("rows.jsonl")
    train, evaluation = read("rows.jsonl", sha256=sha256([Path("rows.jsonl")]))
    assert len(train + evaluation) == 30


def test_an_unknown_name_is_one_sentence(project):
    with pytest.raises(MistakeError, match="datasets has no 'sum'; it has sums, words"):
        data.main("sum")


def test_a_mix_has_the_splits_of_its_parts_one_after_the_other(project):
    parts = {
        "sums": {"source": "file", "path": "sums.jsonl", "train": 40, "eval": 10, "tune": 2, "weight": 3},
        "words": {"source": "file", "path": "words.jsonl", "eval": 5, "weight": 1.0},
    }
    mixed = load_params(write_params(parts)).find("datasets", "both")
    assert mixed.weights() == {"sums": 0.75, "words": 0.25} and mixed.tuning == 2
    single = {
        name: make(LocalFile(**{key: value for key, value in part.items() if key != "weight"}), name)
        for name, part in parts.items()
    }
    expected = {
        split: [record | {"part": name} for name in parts for record in single[name][split]]
        for split in ("eval", "tune", "train")
    }
    assert make(mixed, "both") == expected
    data.main("both")
    counts = json.loads(Path("reports/data/both.json").read_text())["both"]
    assert (counts["train"], counts["eval"], counts["tune"]) == (40 + 31, 15, 2)
    assert list(load_split("both", "train")) == expected["train"]
    assert (counts["rows"], counts["repeated"], set(counts["read"])) == (136, 0, {"sums", "words"})


def test_no_part_of_a_mix_trains_on_what_another_asks(project):
    part = {"source": "file", "path": "sums.jsonl", "eval": 30, "tune": 5, "weight": 1}
    splits = make(load_params(write_params({"one": part, "two": part})).find("datasets", "both"), "both")
    found = [question(record) for split in splits.values() for record in split]
    assert len(found) == len(set(found)) == 100
    assert {record["part"] for record in splits["eval"]} == {"one", "two"}


def test_parts_of_a_mix_can_repeat_a_definition_by_an_anchor(project):
    text = PARAMS.replace("  sums:\n    source", "  sums: &sums\n    source", 1)
    text = text.replace(
        "stages:", "  both:\n    source: mix\n    parts:\n      sums: {<<: *sums, weight: 2}\nstages:", 1
    )
    Path("params.yaml").write_text(text)
    settings = load_params()
    part, alone = (make(settings.datasets[name], "sums") for name in ("both", "sums"))
    assert [len(split) for split in part.values()] == [10, 0, 40]
    assert [record | {"part": "sums"} for record in alone["eval"]] == part["eval"]


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({}, "datasets.both.parts needs at least one name with its settings below it"),
        ({"a": {"source": "mix", "parts": {}}}, "datasets.both.parts.a.source 'mix' is not known; choose one of file,"),
        ({"a": {"path": "x"}}, "datasets.both.parts.a.source is missing; choose one of file,"),
        ({"a": {"source": "file", "path": "x", "eval": 1}}, "datasets.both.parts.a.weight is missing; add it"),
        ({"a": {"source": "file", "path": "x", "eval": 1, "weight": 0}}, "parts.a.weight is 0; it should be greater"),
        ({"a": {"source": "file", "paht": "x"}}, "datasets.both.parts.a.paht is not a known key; did you mean path?"),
        ({"a.b": {"source": "file"}}, "datasets.both.parts.a.b is no usable name; start with a letter"),
    ],
)
def test_a_bad_part_is_one_sentence(project, parts, sentence):
    with pytest.raises(MistakeError) as mistake:
        load_params(write_params(parts))
    assert sentence in str(mistake.value)


def test_a_weight_outside_a_mix_is_refused(project):
    Path("params.yaml").write_text(PARAMS.replace("    train: 40", "    weight: 40", 1))
    with pytest.raises(MistakeError, match=r"datasets.sums.weight is of use in a mix alone; remove it"):
        load_params()


def write_params(parts):
    mixed = json.dumps({"source": "mix", "parts": parts})
    Path("params.yaml").write_text(PARAMS.replace("stages:", f"  both: {mixed}\nstages:", 1))
    return Path("params.yaml")


def test_a_file_is_never_in_memory_as_a_whole(project):
    with Path("sums.jsonl").open("w") as lines:
        for number in range(2000):
            lines.write(json.dumps({"prompt": f"{number}{'+' * 5000}", "completion": "1"}) + "\n")
    Path("params.yaml").write_text(PARAMS.replace("    train: 40", "    train: 1900", 1))
    data.main("words")  # imports what there is to import
    tracemalloc.start()
    try:
        data.main("sums")
        assert sum(1 for _ in load_split("sums", "train")) == 1900
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert Path("data/sums/train.jsonl").stat().st_size > 9e6
    assert peak < 3e6  # of which the hash of the splits reads two at once


@pytest.fixture
def endless(monkeypatch):
    """A hub dataset without an end, in which every question comes twice."""

    def load(*_, streaming, **__):
        assert streaming
        return datasets.IterableDataset.from_generator(
            lambda: ({"prompt": str(number // 2), "completion": "a"} for number in itertools.count())
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(hub, "SHUFFLED", 40)


def test_a_stream_is_read_as_far_as_it_is_needed(endless):
    dataset = Hub(source="hub", id="a/b", revision="c", stream=True, train=20, eval=5, tune=3)
    splits = make(dataset)
    assert {split: len(records) for split, records in splits.items()} == {"eval": 5, "tune": 3, "train": 20}
    asked = [int(question(record)) for records in splits.values() for record in records]
    assert len(set(asked)) == 28
    assert asked != sorted(asked) and max(asked) < (40 + 2 * 28) / 2


@pytest.fixture
def folder(monkeypatch):
    """A folder that the hub's library streams from, without its wait for threads at the end."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    Path("folder").mkdir()


@pytest.mark.parametrize("train", [None, 12])
def test_a_stream_that_ends_gives_what_it_has(folder, train):
    write_rows("folder/train.parquet", [*ROWS, *ROWS])
    dataset = Hub(source="hub", id="folder", revision="main", stream=True, train=train, eval=5, tune=4)
    splits = make(dataset)
    assert {split: len(records) for split, records in splits.items()} == {"eval": 5, "tune": 4, "train": train or 21}
    assert len({question(record) for records in splits.values() for record in records}) == 9 + (train or 21)
    assert make(dataset) == splits != make(dataset, "y")


@pytest.mark.parametrize(
    ("sizes", "missing"),
    [({"eval": 31}, 1), ({"eval": 30}, 1), ({"eval": 5, "train": 27}, 2), ({"eval": 30, "tune": 3}, 3)],
)
def test_a_stream_that_ends_too_early_is_one_sentence(folder, sizes, missing):
    write_rows("folder/train.parquet")
    dataset = Hub(source="hub", id="folder", revision="main", stream=True, **sizes)
    with pytest.raises(
        MistakeError, match=f"datasets.x ends {missing} different records too early for train, eval and"
    ):
        make(dataset)


def test_what_was_found_is_said(project, capsys):
    make_tokenizer().save_pretrained("checkpoints/base")
    rows = [{"question": f"{i}?", "answer": {"text": i if i > 2 else None}} for i in range(20)]
    Path("sums.json").write_text(json.dumps([*rows, *rows[3:9], {"question": "8?", "answer": {"text": "x"}}]))
    keys = "    columns: {prompt: question, completion: answer.text}\n    format: plain\n"
    text = PARAMS.replace(
        "    path: sums.jsonl\n    train: 40\n    eval: 10", f"    path: sums.json\n    eval: 10\n{keys}", 1
    )
    Path("params.yaml").write_text(text)
    expected = (
        "sums: json, prompts and completions (question, answer.text); format plain, learn all\n"
        "27 rows read, 3 empty, 6 there twice (the first empty one is sums.json record 1)\n"
    )
    show("sums", 1)
    assert capsys.readouterr().out.startswith(expected)
    data.main("sums")
    show("sums", 1)
    assert capsys.readouterr().out.startswith(expected)


SHOWN = """\
⟨weight⟩ of the tokens that follow; · between two of the same weight

example 1, 5 tokens, 2 of them supervised (40 %)
⟨0⟩a·↵
\\x1b⟨0.5⟩b·$

example 2, 4 tokens, 2 of them supervised (50 %)
⟨0⟩c⟨1⟩d⟨-2⟩e⟨0⟩$

together 9 tokens, 4 of them supervised (44 %)
"""


@pytest.fixture
def weighted(project):
    """Two written training examples, one with weights above and one with a weight below zero, and a tokenizer."""
    make_tokenizer().save_pretrained("checkpoints/base")
    first = {"prompt": "a\n\x1b", "completion": "b", "weight": 0.5}
    second = {"input_ids": [99, 100, 101, 0], "loss_weights": [1, 1, -2, 0]}
    Path("data/sums").mkdir(parents=True)
    Path("data/sums/train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in (first, second, first)))


def test_weights_are_shown_as_numbers(weighted, capsys):
    show("sums", 2)
    assert capsys.readouterr().out.replace("<end>", "$") == SHOWN


def test_weights_are_shown_as_colours_in_a_terminal(weighted, capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show("sums", 2)
    shown = capsys.readouterr().out
    ground = "\x1b[38;5;16;48;5;{}m{}\x1b[0m".format
    assert f"c{ground(120, 'd')}{ground(196, 'e')}<end>\n" in shown  # 1 is half of 2, the strongest
    assert f"a·↵\n\\x1b{ground(157, 'b')}·{ground(157, '<end>')}\n" in shown
    assert ground(46, " 2 ") in shown and ground(196, " -2 ") in shown
    monkeypatch.setenv("NO_COLOR", "1")
    show("sums", 2)
    assert capsys.readouterr().out.replace("<end>", "$") == SHOWN


def test_what_is_not_yet_made_is_shown_and_not_written(project, capsys):
    make_tokenizer().save_pretrained("checkpoints/base")
    write_params({"sums": {"source": "file", "path": "sums.jsonl", "eval": 10, "weight": 1}})
    show("both", 3)
    shown = capsys.readouterr().out
    first = make(LocalFile(source="file", path="sums.jsonl", eval=10), "sums")["train"][0]
    prompt, completion = ("·".join(first[key]) for key in ("prompt", "completion"))
    assert "example 1 of sums" in shown and "example 3" in shown and "example 4" not in shown
    assert f"⟨0⟩{prompt}⟨1⟩{completion}·<end>\n" in shown
    assert shown.startswith(
        "sums: jsonl, prompts and completions (prompt, completion); format auto, learn all\n100 rows read\n"
    )
    assert not Path("data").exists()


def test_of_a_stream_too_what_is_trained_on_is_shown(project, endless, capsys):
    make_tokenizer().save_pretrained("checkpoints/base")
    keys = {"source": "hub", "id": "a/b", "revision": "c", "stream": True, "train": 2, "eval": 4, "tune": 3}
    write_params({"web": keys | {"weight": 1}})
    show("both", 1)
    first = make(Hub(**keys), "web")["train"][0]
    assert f"⟨0⟩{'·'.join(first['prompt'])}⟨1⟩a·<end>\n" in capsys.readouterr().out


def test_without_a_base_there_is_nothing_to_show(project):
    with pytest.raises(
        MistakeError, match="checkpoints/base is missing, and with it the tokenizer; run dvc repro base"
    ):
        show("sums", 3)


def test_the_command_writes_or_says_what_is_wrong(project):
    def command(module, *words):
        line = [sys.executable, "-m", module, *words]
        return subprocess.run(line, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)

    assert command("stages.data", "sums").returncode == 0 and len(load_split("sums", "train")) == 40
    unknown = command("tools.cli", "show", "sum")
    assert (unknown.returncode, unknown.stderr) == (
        1,
        "error: params.yaml: datasets has no 'sum'; it has sums, words\n",
    )
    assert "'0' is no number from 1" in command("tools.cli", "show", "sums", "0").stderr
