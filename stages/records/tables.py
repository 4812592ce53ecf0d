"""Rows of csv, tsv and parquet files."""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path

from stages.errors import MistakeError, first_line
from stages.records.rows import Rows

DELIMITERS = ",;\t"  # of a csv file: the first of them that its first row has outside of quotes
NAMED = re.compile(r"sep=(.)\r?\n", re.IGNORECASE)  # a line before the first, by which Excel names the delimiter
QUOTED = r'"[^"]*"'
FIRST_ROW = re.compile(rf'(?:{QUOTED}|[^"\r\n])*')


def read_csv(path: Path, stored: Path, kind: str) -> Rows:
    """Rows of a UTF-8 file with commas, semicolons or tabs, whose first row names the columns; every value is text.

    Excel's `sep=;` may stand before them.

    Args:
        path: the file's own name, for sentences.
        stored: where its content is.
        kind: `.tsv`, where only tabs part the fields, or `.csv`.

    Raises:
        MistakeError: it is not such a file, or a row has more or fewer fields than the first.
    """
    text = decode(path, stored.read_bytes())
    named = NAMED.match(text)
    text = text[named.end() :] if named else text
    first_row = FIRST_ROW.match(text.lstrip("\r\n"))
    head = re.sub(QUOTED, "", first_row[0] if first_row else "")
    delimiter = "\t" if kind == ".tsv" else next((each for each in DELIMITERS if each in head), ",")
    fields_of_lines = _fields(path, text, named[1] if named else delimiter, start=2 if named else 1)
    first, header = next(fields_of_lines, (1, []))
    header = [name.strip() for name in header]
    names = [name for name in header if name]
    if not names or len(names) > len(set(names)):
        raise MistakeError(f"{path} line {first} should name the columns, each name once, such as prompt,completion")
    if names == header and len(names) == 1 and "|" in names[0]:
        raise MistakeError(
            f"{path} line {first} has one column, {names[0]!r}; part the columns by commas, semicolons or tabs, or"
            " write sep=| in a line before it"
        )
    rows, lines = [], []
    for line, fields in fields_of_lines:
        if len(fields) != len(header):
            raise MistakeError(
                f"{path} line {line} should have as many fields as line {first}, {len(header)}, and has {len(fields)};"
                f" correct it, and put quotes around a field with {delimiter!r}"
            )
        rows.append(dict(zip(header, fields, strict=True)))
        lines.append(line)
    return Rows(rows, lambda place: f"{path} line {lines[place]}", kind.removeprefix("."))


def _fields(path: Path, text: str, delimiter: str, start: int) -> Iterator[tuple[int, list[str]]]:
    """The line that each row starts on, counted from `start`, and its fields; blank lines are left out."""
    csv.field_size_limit(2**31 - 1)  # one field may be a whole book
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = start
    try:
        for fields in rows:
            if fields:
                yield line, fields
            line = start + rows.line_num
    except csv.Error as error:
        raise MistakeError(
            f"{path} line {line} begins no row of a csv file ({error}); close each quote, and double those inside"
        ) from None


def decode(path: Path, content: bytes) -> str:
    """Text of a UTF-8 file, with or without the mark that some programs begin it with."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise MistakeError(f"{path} line {line} is not in UTF-8; save the file in that encoding") from None


def read_parquet(path: Path, stored: Path) -> Rows:
    """Rows of a parquet file at `stored`, called `path` in sentences.

    Raises:
        MistakeError: it is no parquet file, or has two columns of one name.
    """
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(stored)
        rows = table.to_pylist()
    except (OSError, ValueError, KeyError) as error:  # pyarrow's own are ValueErrors and KeyErrors too
        raise MistakeError(f"{path} is no parquet file that can be read ({first_line(error)}); write it anew") from None
    if len(set(table.column_names)) < len(table.column_names):
        raise MistakeError(f"{path} has two columns of one name; rename one")
    return Rows(rows, lambda place: f"{path} row {place + 1}", "parquet", gaps=True)
