"""Records in a jsonl, csv or parquet file (`source: file`)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from stages.errors import MistakeError, first_line
from stages.files import sha256
from stages.records.lines import Lines
from stages.records.record import Checked
from stages.records.source import Single


class LocalFile(Single):
    """A file on this machine, one record a line or row."""

    source: Literal["file"]
    path: str
    """The .jsonl, .csv or .parquet file."""
    sha256: str | None = None
    """Hash of the file. It pins the content, of which the path says nothing; one that has changed is refused."""

    def records(self, seed: str, where: str) -> Checked:
        """All records of the file."""
        path = Path(self.path)
        if not path.is_file():
            raise MistakeError(f"{where}.path {self.path!r} is not a file; correct the path")
        if self.sha256 is not None and self.sha256 != (found := sha256([path])):
            raise MistakeError(f"{where}.sha256 is not that of {path}; if it was meant to change, write {found}")
        if path.suffix not in READERS:
            raise MistakeError(f"{where}.path {self.path!r} is no .jsonl, .csv or .parquet file; convert it")
        return READERS[path.suffix](path)


def read_jsonl(path: Path) -> Checked:
    """Records of a file with one JSON object a line."""
    lines = Lines(path)
    return Checked(lines, lines.where)


def read_csv(path: Path) -> Checked:
    """Records of a comma-separated UTF-8 file, whose first row names the columns; every value is text.

    Raises:
        MistakeError: it is not such a file, or a row has more or fewer fields than the first.
    """
    rows = _csv_rows(path)
    first, header = next(rows, (1, []))
    names = [name for name in header if name]
    if not names or len(names) > len(set(names)):
        raise MistakeError(f"{path} line {first} should name the columns, each name once, such as prompt,completion")
    records, lines = [], []
    for line, fields in rows:
        if len(fields) != len(header):
            raise MistakeError(
                f"{path} line {line} should have as many fields as line {first}, {len(header)}, and has {len(fields)};"
                " correct it, and put quotes around a field with a comma"
            )
        records.append(dict(zip(header, fields, strict=True)))
        lines.append(line)
    return Checked(records, lambda place: f"{path} line {lines[place]}")


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The line that each row starts on, from 1, and its fields; blank lines are left out."""
    csv.field_size_limit(2**31 - 1)  # one field may be a whole book
    rows = csv.reader(io.StringIO(_decode(path), newline=""), strict=True)
    line = 1
    try:
        for fields in rows:
            if fields:
                yield line, fields
            line = rows.line_num + 1
    except csv.Error as error:
        raise MistakeError(
            f"{path} line {line} begins no row of a csv file ({error}); close each quote, and double those inside"
        ) from None


def _decode(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise MistakeError(f"{path} line {line} is not in UTF-8; save the file in that encoding") from None


def read_parquet(path: Path) -> Checked:
    """Records of a parquet file.

    Raises:
        MistakeError: it is no parquet file, or has a column that is no text, numbers or lists of them.
    """
    import pandas

    try:
        table = pandas.read_parquet(path)
    except (OSError, ValueError) as error:
        raise MistakeError(f"{path} is no parquet file ({first_line(error)}); write it anew") from None
    try:
        # The round trip through JSON turns numpy's nested arrays into plain lists.
        rows = json.loads(_to_json(table))
    except (ValueError, OverflowError) as error:  # such as bytes that are no text
        names = ", ".join(str(name) for name in table if not _is_writable(table[[name]]))
        raise MistakeError(
            f"{path} has columns that are no text, numbers or lists of them ({first_line(error)}); remove {names}"
        ) from None
    return Checked(rows, lambda place: f"{path} row {place + 1}")


def _is_writable(table: Any) -> bool:
    try:
        return bool(_to_json(table))
    except (ValueError, OverflowError):
        return False


def _to_json(table: Any) -> str:
    return table.to_json(orient="records", date_format="iso", force_ascii=False)


READERS = {".jsonl": read_jsonl, ".csv": read_csv, ".parquet": read_parquet}
