"""Files of records that are not what they seem: one sentence with the line, and what pandas reads where all is well."""

import csv
import json
import random
import warnings
from pathlib import Path

import pandas
import pytest

from stages.errors import MistakeError
from stages.records.sources.file import LocalFile
from stages.records.sources.hub import Hub


def read(path):
    return list(LocalFile(source="file", path=path, eval=1).records("", "params.yaml: datasets.x"))


def mistake_of(path, source=read):
    with pytest.raises(MistakeError) as mistake:
        source(path)
    assert "\n" not in str(mistake.value)
    return str(mistake.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "rows.csv line 1 should name the columns, each name once, such as prompt,completion"),
        ("\n\n", "rows.csv line 1 should name the columns"),
        (",,\na,b,c\n", "rows.csv line 1 should name the columns"),
        ("\nprompt,completion,prompt\na,b,c\n", "rows.csv line 2 should name the columns, each name once"),
        (
            "prompt,completion\nq,a,x\n",
            "rows.csv line 2 should have as many fields as line 1, 2, and has 3; correct it",
        ),
        ("prompt,completion\nq,a\nr,b,c,d\n", "rows.csv line 3 should have as many fields as line 1, 2, and has 4"),
        ("prompt,completion\nq,a\nr\n", "rows.csv line 3 should have as many fields as line 1, 2, and has 1"),
        ('prompt,completion\nq,a\n"r,b\ns,c\n', "rows.csv line 3 begins no row of a csv file (unexpected end of data)"),
        ('prompt,completion\nq,a\n"r"s,b\n', "rows.csv line 3 begins no row of a csv file (',' expected after '\"')"),
        ("prompt;completion\nq;a\n", "rows.csv line 2 needs exactly one of text, prompt with completion"),
        ("prompt,completion\nq1,a1\n\n\nq2,\nq3,a3\n", "rows.csv line 5 needs completion as text that is not empty"),
        ('prompt,completion\n"q1\nmore\nmore",a1\nq2,\nq3,a3\n', "rows.csv line 5 needs completion as text"),
        ('prompt,completion\r\n"q1\r\nmore",a1\r\n\r\nq2,\r\n', "rows.csv line 5 needs completion as text"),
        ('prompt,completion\nq1,a1\n"q2\nmore",\n', "rows.csv line 3 needs completion as text"),
        (b"prompt,completion\nq,a\ncaf\xe9,b\n", "rows.csv line 3 is not in UTF-8; save the file in that encoding"),
        ("prompt,completion\nq,a\n".encode("utf-16"), "rows.csv line 1 is not in UTF-8"),
    ],
)
def test_a_csv_file_that_is_none_is_one_sentence_with_its_line(content, sentence):
    Path("rows.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert sentence in mistake_of("rows.csv")


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_csv_file_is_read_as_pandas_reads_it(ending, mark):
    draw = random.Random(0)
    pieces = [
        "a",
        "é",
        "\U0001f600",
        '"',
        ",",
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
    with Path("rows.csv").open("w", encoding="utf-8", newline="") as file:
        file.write(mark)
        csv.writer(file, lineterminator=ending).writerows([["prompt", "completion"], *rows])
    assert [[record["prompt"], record["completion"]] for record in read("rows.csv")] == rows
    assert read("rows.csv") == pandas.read_csv("rows.csv", dtype=str, keep_default_na=False).to_dict("records")


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
def test_images_are_refused(image):
    write_images(image)
    sentence = mistake_of("rows.parquet")
    assert sentence.startswith("rows.parquet has columns that are no text") and sentence.endswith("; remove image")
    hub = Hub(source="hub", id="folder", revision="main", eval=1)
    assert mistake_of("folder", lambda _: list(hub.records("", "params.yaml: datasets.x"))) == (
        "params.yaml: datasets.x: folder row 1 has a value of type bytes in 'image'; remove that column"
    )


def test_dates_stand_beside_a_record_without_a_warning():
    write_images(pandas.Timestamp("2020-01-02"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read("rows.parquet")[0] == {"prompt": "q0", "completion": "a", "image": "2020-01-02T00:00:00.000"}
    hub = Hub(source="hub", id="folder", revision="main", eval=1)
    assert "2020-01-02" in json.dumps(list(hub.records("", "")), default=str)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"prompt,completion\nq,a\n"])
def test_a_parquet_file_that_is_none_is_one_sentence(content):
    Path("rows.parquet").write_bytes(content)
    assert mistake_of("rows.parquet").startswith("rows.parquet is no parquet file (")
