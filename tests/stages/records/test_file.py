"""What is in a file, and what comes of it: records, or one sentence with the line."""

import csv
import gzip
import json
import random
import warnings
from datetime import date
from decimal import Decimal
from pathlib import Path

import datasets
import numpy
import pandas
import pyarrow
import pytest

from stages.errors import MistakeError
from stages.files import sha256
from stages.records.sources.file import LocalFile
from stages.records.sources.hub import Hub

WHERE = "params.yaml: datasets.x"


def source(path, **keys):
    return LocalFile(source="file", path=path, eval=1, **keys)


def read(path, **keys):
    return list(source(path, **keys).records("", WHERE))


def mistake_of(path, **keys):
    with pytest.raises(MistakeError) as mistake:
        read(path, **keys)
    assert "\n" not in str(mistake.value)
    return str(mistake.value)


def zst(text):
    return pyarrow.compress(text.encode(), codec="zstd", asbytes=True)


def gz(text):
    return gzip.compress(text.encode(), mtime=0)


Q = [{"prompt": "q", "completion": "a"}, {"prompt": "r", "completion": "b"}]
LINES = '{"prompt": "q", "completion": "a"}\n{"prompt": "r", "completion": "b"}\n'
LIST = f"[{','.join(LINES.splitlines())}]"
CSV = "prompt,completion\nq,a\nr,b\n"
TSV = CSV.replace(",", "\t")
NAMED = {"columns": {"prompt": "question", "completion": "answer"}}

KINDS = [
    ("rows.jsonl", LINES, "jsonl"),
    ("rows.ndjson", LINES, "jsonl"),
    ("ROWS.JSONL", LINES, "jsonl"),
    ("rows.jsonl", LINES.strip(), "jsonl"),
    ("rows.jsonl", f"\ufeff\r\n{LINES}".replace("\n", "\r\n\r\n"), "jsonl"),
    ("rows.json", LINES, "jsonl"),
    ("rows.json", LIST, "json"),
    ("rows.json", f"\ufeff{json.dumps(Q, indent=2)}\r\n", "json"),
    ("rows.jsonl", LIST, "json"),
    ("rows.jsonl", json.dumps(Q, indent=2), "json"),
    ("rows.json", f'{{"version": "1", "tags": ["a"], "data": {LIST}}}', "json"),
    ("rows.json", json.dumps({"rows": Q, "more": []}, indent=1), "json"),
    ("rows.jsonl.gz", gz(LINES), "jsonl"),
    ("rows.jsonl.gz", gz(LINES[:35]) + gz(LINES[35:]), "jsonl"),
    ("rows.jsonl.zst", zst(LINES), "jsonl"),
    ("rows.json.gz", gz(LIST), "json"),
    ("rows.json.zst", zst(LIST), "json"),
    ("rows.json.zst", zst(LINES), "jsonl"),
    ("rows.csv", CSV, "csv"),
    ("rows.csv", CSV.replace("prompt,completion", '" prompt", completion'), "csv"),
    ("rows.csv", f"\ufeff{CSV}".replace("\n", "\r\n"), "csv"),
    ("rows.csv", "\n\nprompt,completion\n\nq,a\n\nr,b", "csv"),
    ("rows.csv", CSV.replace(",", ";"), "csv"),
    ("rows.csv", TSV, "csv"),
    ("rows.csv", f"\ufeffsep=;\r\n{CSV}".replace(",", ";"), "csv"),
    ("rows.csv", f"sep=|\n{CSV}".replace(",", "|"), "csv"),
    ("rows.csv.gz", gz(CSV), "csv"),
    ("rows.csv.zst", zst(CSV), "csv"),
    ("rows.tsv", TSV, "tsv"),
    ("rows.tsv", 'prompt\tcompletion\n"q"\ta\nr\t"b"\n', "tsv"),
    ("rows.tsv.gz", gz(TSV), "tsv"),
]


@pytest.mark.parametrize(("name", "content", "kind"), KINDS)
def test_the_same_rows_from_each_kind_of_file(name, content, kind):
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    records = source(name).records("", WHERE)
    assert list(records) == Q == [records[0], records[1]]
    assert records.found.told() == f"{kind}, prompts and completions (prompt, completion)"
    assert read(name, sha256=sha256([Path(name)])) == Q


def test_what_parts_the_columns_stands_outside_of_quotes():
    Path("rows.csv").write_text('"question, with commas";"the ""answer"", in short"\nq;a\n')
    (record,) = read("rows.csv", columns={"prompt": "question, with commas", "completion": 'the "answer", in short'})
    assert record == {"prompt": "q", "completion": "a"}


def save(path, rows):
    """A table as parquet, or as the folder that `save_to_disk` leaves."""
    table = pyarrow.Table.from_pylist(rows)
    if path.endswith(".parquet"):
        pandas.DataFrame(rows).to_parquet(path)
    else:
        datasets.Dataset(table).save_to_disk(path)


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "1"}}}
CALLED = [
    CHAT[0],
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "2"},
    CHAT[1],
]
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "string"}}}}},
    {"type": "function", "function": {"name": "g", "parameters": {"properties": {"y": {"type": "string"}}}}},
]


@pytest.mark.parametrize("path", ["rows.parquet", "folder"])
@pytest.mark.parametrize(
    ("rows", "keys", "records"),
    [
        (Q, {}, Q),
        ([{"messages": CHAT}], {}, [{"messages": CHAT}]),
        ([{"text": "a", "id": 7}, {"text": "b", "id": None}], {}, [{"text": "a", "id": 7}, {"text": "b", "id": None}]),
        (
            [{"text": "a", "weight": 0.5}, {"text": "b", "weight": None}],
            {},
            [{"text": "a", "weight": 0.5}, {"text": "b"}],
        ),
        (
            [{"messages": [CHAT[0], CHAT[1] | {"content": None}]}, {"messages": CHAT}],
            {},
            [{"messages": [CHAT[0], CHAT[1] | {"content": ""}]}, {"messages": CHAT}],
        ),
        (
            # Each column holds the keys of all rows together, most of them null.
            [{"messages": CALLED, "tools": TOOLS}, {"messages": CHAT, "tools": None}],
            {},
            [
                {"messages": [CALLED[0], CALLED[1] | {"content": ""}, *CALLED[2:]], "tools": TOOLS},
                {"messages": CHAT},
            ],
        ),
        (
            [{"question": "q", "answers": {"text": ["a", "b"]}}, {"question": "r", "answers": {"text": []}}],
            {"columns": {"prompt": "question", "completion": "answers.text.0"}},
            [{"prompt": "q", "completion": "a"}, {"prompt": "r", "completion": ""}],
        ),
        ([{"prompt": 1, "completion": 42}], {}, [{"prompt": "1", "completion": "42"}]),
        (
            [{"prompt": "q", "completion": 42}, {"prompt": "r", "completion": None}],
            {},
            [{"prompt": "q", "completion": "42"}, {"prompt": "r", "completion": ""}],
        ),
        ([{"prompt": "q", "completion": 0.25}], {}, [{"prompt": "q", "completion": "0.25"}]),
        ([{"prompt": "q", "completion": date(2026, 1, 31)}], {}, [{"prompt": "q", "completion": "2026-01-31"}]),
        ([{"prompt": "q", "completion": Decimal("1.50")}], {}, [{"prompt": "q", "completion": "1.50"}]),
    ],
)
def test_tables_are_read_as_they_are_meant(path, rows, keys, records):
    save(path, rows)
    assert read(path, **keys) == records


def test_numbers_and_gaps_of_numpy_are_text():
    columns = {
        "prompt": numpy.array([1, 2, 3], dtype="int8"),
        "completion": numpy.array([7, numpy.nan, 9]),
        "input": pandas.Categorical(["a", None, "b"]),
        "messages": [None] * 3,
    }
    pandas.DataFrame(columns).to_parquet("rows.parquet")
    keys = {"columns": {key: key for key in ("prompt", "completion", "input")}}
    assert [record["completion"] for record in read("rows.parquet", **keys)] == ["7", "", "9"]
    assert [record["prompt"] for record in read("rows.parquet", **keys)] == ["1\n\na", "2", "3\n\nb"]


@pytest.mark.parametrize(
    ("write", "keys", "sentence"),
    [
        (
            lambda: datasets.DatasetDict(train=TABLE, test=TABLE.select([0])),
            {},
            "x.split is missing, for path holds several",
        ),
        (
            lambda: datasets.DatasetDict(train=TABLE, test=TABLE),
            {"split": "tset"},
            "x.split 'tset' is not in what path holds; did you mean test?",
        ),
        (lambda: TABLE, {"split": "train"}, "x.split 'train' is not in what path holds; remove it"),
    ],
)
def test_a_split_that_is_not_there_is_one_sentence(write, keys, sentence):
    write().save_to_disk("folder")
    assert sentence in mistake_of("folder", **keys)


TABLE = datasets.Dataset.from_list(Q)


def test_one_of_several_splits_is_read():
    datasets.DatasetDict(train=TABLE, test=TABLE.select([1])).save_to_disk("folder")
    assert read("folder", split="train") == Q and read("folder", split="test") == Q[1:]
    datasets.DatasetDict(train=TABLE).save_to_disk("single")
    assert read("single") == Q
    Path("rows.json").write_text(json.dumps({"train": Q, "test": Q[1:]}))
    assert read("rows.json", split="test") == Q[1:]
    found = sha256(sorted(path for path in Path("single").rglob("*") if path.is_file()))
    assert read("single", sha256=found) == Q
    assert f"if it was meant to change, write {found}" in mistake_of("single", sha256="abc")


DIRT = [
    # csv and tsv
    ("rows.csv", "", "rows.csv line 1 should name the columns, each name once, such as prompt,completion"),
    ("rows.csv", "\n\n", "rows.csv line 1 should name the columns"),
    ("rows.csv", ",,\na,b,c\n", "rows.csv line 1 should name the columns"),
    ("rows.csv", "\nprompt,completion,prompt\na,b,c\n", "rows.csv line 2 should name the columns, each name once"),
    ("rows.csv", "prompt,completion\nq,a,x\n", "rows.csv line 2 should have as many fields as line 1, 2, and has 3"),
    ("rows.csv", "prompt,completion\nq,a\nr,b,c,d\n", "rows.csv line 3 should have as many fields as line 1, 2, and"),
    ("rows.csv", "prompt,completion\nq,a\nr\n", "rows.csv line 3 should have as many fields as line 1, 2, and has 1"),
    ("rows.csv", 'prompt,completion\nq,a\n"r,b\ns,c\n', "rows.csv line 3 begins no row of a csv file (unexpected end"),
    ("rows.csv", 'prompt,completion\nq,a\n"r"s,b\n', "rows.csv line 3 begins no row of a csv file (',' expected after"),
    ("rows.csv", b"prompt,completion\nq,a\ncaf\xe9,b\n", "rows.csv line 3 is not in UTF-8; save the file in that"),
    ("rows.csv", CSV.encode("utf-16"), "rows.csv line 1 is not in UTF-8"),
    ("rows.csv", "text,weight\na,b\n", "rows.csv line 2 has weight 'b'; write a finite number"),
    ("rows.csv", "messages\n\"[{'role': 1}]\"\n", "rows.csv line 2 is text that is not JSON; write a list or mapping"),
    ("rows.tsv", "prompt\tcompletion\nq\ta\nr\tb\tc\n", "rows.tsv line 3 should have as many fields as line 1, 2"),
    ("rows.tsv", CSV, "rows.tsv line 2 has the columns prompt,completion, which are no known shape"),
    ("rows.tsv.gz", gz("prompt\tcompletion\nq\n"), "rows.tsv.gz line 2 should have as many fields"),
    ("rows.csv", "sep=;\nprompt;completion\nq;a\nr\n", "rows.csv line 4 should have as many fields as line 2, 2, and"),
    # jsonl
    ("rows.jsonl", "", "datasets.x.path 'rows.jsonl' holds no records; fill it, or correct the path"),
    ("rows.json", "[]", "datasets.x.path 'rows.json' holds no records"),
    ("rows.csv", "prompt,completion\n", "datasets.x.path 'rows.csv' holds no records"),
    ("rows.jsonl", '{"prompt": "q", "completion": Infinity}', "rows.jsonl line 1 completion is inf and no text"),
    (
        "rows.jsonl",
        f"{json.dumps(Q[0], indent=1)}\n" * 2,
        "rows.jsonl line 5 is not valid JSON (Extra data); correct it: one list of records, or a record on each line",
    ),
    ("rows.jsonl", f"{LINES}{{not json", "rows.jsonl line 3 is not valid JSON (Expecting property name"),
    ("rows.jsonl", f"{LINES}\n{{'text': 'a'}}", "rows.jsonl line 4 is not valid JSON (Expecting property name"),
    ("rows.jsonl", f"{{\n{LINES}", "rows.jsonl line 2 is not valid JSON (Expecting property name"),
    ("rows.jsonl", f'{LINES}["a"]', "rows.jsonl line 3 is no mapping of keys; write one record per line"),
    ("rows.jsonl", f"{LINES}null", "rows.jsonl line 3 is no mapping of keys; write one record per line"),
    ("rows.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "rows.jsonl line 2 is not valid JSON ('utf-8' codec"),
    (
        "rows.jsonl",
        '{"text": "a"}\n{"text": "b", "text": "c"}',
        "rows.jsonl line 2 is not valid JSON ('text' is there tw",
    ),
    ("rows.jsonl.gz", gz(f"{LINES}{{not json"), "rows.jsonl.gz line 3 is not valid JSON"),
    # json
    ("rows.json", '[{"text": "a"},\n{"text": }]', "rows.json line 2 is not valid JSON (Expecting value); correct it"),
    ("rows.json", '[{"text": "a", "text": "b"}]', "rows.json is not valid JSON ('text' is there twice); correct it"),
    ("rows.json", '{"prompt": {"0": "q"}, "completion": {"0": "a"}}', "rows.json holds no list of records; write one"),
    ("rows.json", json.dumps({"a": Q, "b": Q}), "datasets.x.split is missing, for path holds several; choose one of a"),
    ("rows.json", '[{"text": "a"}, 7]', "rows.json record 2 is no mapping of keys"),
    # packed
    ("rows.jsonl.gz", LINES, "rows.jsonl.gz is no whole gzip file ("),
    ("rows.jsonl.gz", gz(LINES * 99)[:50], "rows.jsonl.gz is no whole gzip file ("),
    ("rows.jsonl.zst", gz(LINES), "rows.jsonl.zst is no whole zstd file ("),
    # parquet
    ("rows.parquet", b"", "rows.parquet is no parquet file that can be read ("),
    ("rows.parquet", b"PAR1", "rows.parquet is no parquet file that can be read ("),
    ("rows.parquet", CSV, "rows.parquet is no parquet file that can be read ("),
    # neither
    ("rows.txt", "a", "datasets.x.path 'rows.txt' is no .jsonl, .ndjson, .json, .csv, .tsv or .parquet file"),
    ("rows.xlsx.gz", gz("a"), "datasets.x.path 'rows.xlsx.gz' is no .jsonl,"),
]


@pytest.mark.parametrize(("name", "content", "sentence"), DIRT)
def test_what_a_file_should_not_hold_is_one_sentence_with_its_line(name, content, sentence):
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert sentence in mistake_of(name)


def test_what_is_no_file_is_one_sentence():
    assert mistake_of("none.jsonl") == f"{WHERE}.path 'none.jsonl' is not there; correct the path"
    Path("folder").mkdir()
    assert mistake_of("folder").startswith(f"{WHERE}.path 'folder' is no folder of save_to_disk (")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("prompt,completion\nq1,a1\n\n\nq2,\nq3,a3\n", 5),
        ('prompt,completion\n"q1\nmore\nmore",a1\nq2,\nq3,a3\n', 5),
        ('prompt,completion\r\n"q1\r\nmore",a1\r\n\r\nq2,\r\nq3,a3\r\n', 5),
        ('prompt,completion\nq1,a1\n"q2\nmore",\n', 3),
    ],
)
def test_a_row_of_a_csv_file_has_the_line_that_it_begins_on(content, line):
    Path("rows.csv").write_bytes(content.encode())
    records = source("rows.csv").records("", WHERE)
    assert [records.where(place) for place, record in enumerate(records) if not record["completion"]] == [
        f"rows.csv line {line}"
    ]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize(("name", "delimiter"), [("rows.csv", ","), ("rows.tsv", "\t")])
def test_a_csv_file_is_read_as_pandas_reads_it(ending, mark, name, delimiter):
    draw = random.Random(0)
    pieces = [
        "a",
        "é",
        "\U0001f600",
        '"',
        ",",
        "\t",
        "\n",
        " ",
        "NA",
        "null",
        "nan",
        "1.0",
        "\u2028",
        ";",
        "'",
        "x" * 200_000,
    ]
    rows = [["".join(draw.choices(pieces, k=4)) + str(i) for _ in range(2)] for i in range(50)]
    with Path(name).open("w", encoding="utf-8", newline="") as file:
        file.write(mark)
        csv.writer(file, delimiter=delimiter, lineterminator=ending).writerows([["prompt", "completion"], *rows])
    assert [[record["prompt"], record["completion"]] for record in read(name)] == rows
    assert read(name) == pandas.read_csv(name, sep=delimiter, dtype=str, keep_default_na=False).to_dict("records")


def test_a_column_without_a_name_is_no_matter():
    pandas.DataFrame({"text": ["a", "b"]}).to_csv("rows.csv")
    assert read("rows.csv") == [{"": "0", "text": "a"}, {"": "1", "text": "b"}]


@pytest.mark.parametrize(
    "record",
    [
        '{"prompt": "q \\ud83d", "completion": "a"}',
        '{"prompt": "q", "completion": "\\ude00\\ud83d"}',
        '{"text": "a", "note": {"by": ["\\ud83d"]}}',
        '{"text": "a", "\\ud83d": 1}',
        '{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "a"}]}',
        '{"conversations": [{"from": "human", "value": "\\ud83d"}, {"from": "gpt", "value": "a"}]}',
    ],
)
def test_half_a_character_is_named_by_its_line(record):
    Path("rows.jsonl").write_text('{"prompt": "\\ud83d\\ude00", "completion": "a"}\n\n' + record)
    assert mistake_of("rows.jsonl").startswith("rows.jsonl line 3 has half a character, '\\ud")


def write_images(image):
    Path("folder").mkdir()
    for path in ("rows.parquet", "folder/train.parquet"):
        pandas.DataFrame([{"prompt": f"q{i}", "completion": "a", "image": image} for i in range(4)]).to_parquet(path)


@pytest.mark.parametrize("image", [b"\xff\xd8", {"bytes": b"\xff\xd8", "path": "a.png"}, [b"\xff\xd8"]])
def test_images_are_refused_unless_other_columns_are_named(image):
    write_images(image)
    hub = {"source": "hub", "id": "folder", "revision": "main", "eval": 1}
    named = {"columns": {"prompt": "prompt", "completion": "completion"}}
    sentence = (
        "row 1 has a value of type bytes in 'image'; remove that column, or name with columns those that are learned"
    )
    assert mistake_of("rows.parquet") == f"rows.parquet {sentence}"
    assert read("rows.parquet", **named)[0] == {"prompt": "q0", "completion": "a"}
    with pytest.raises(MistakeError) as mistake:
        list(Hub(**hub).records("", WHERE))
    assert str(mistake.value) == f"{WHERE}: folder {sentence}"
    assert next(iter(Hub(**hub, **named).records("", WHERE))) == {"prompt": "q0", "completion": "a"}


def test_dates_stand_beside_a_record_without_a_warning():
    write_images(pandas.Timestamp("2020-01-02"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "2020-01-02" in json.dumps(read("rows.parquet")[0], default=str)
    hub = Hub(source="hub", id="folder", revision="main", eval=1)
    assert "2020-01-02" in json.dumps(list(hub.records("", "")), default=str)
