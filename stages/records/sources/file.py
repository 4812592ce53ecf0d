"""Records in a jsonl, csv or parquet file (`source: file`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from stages.errors import MistakeError
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
        if path.suffix == ".jsonl":
            lines = Lines(path)
            return Checked(lines, lines.where)
        if path.suffix not in (".csv", ".parquet"):
            raise MistakeError(f"{where}.path {self.path!r} is no .jsonl, .csv or .parquet file; convert it")
        import pandas

        if path.suffix == ".csv":
            # The header is line 1, so the first record is on line 2.
            table = pandas.read_csv(path, dtype=str, keep_default_na=False)
            return Checked(table.to_dict("records"), lambda place: f"{path} line {place + 2}")
        # The round trip through JSON turns numpy's nested arrays into plain lists.
        table = pandas.read_parquet(path)
        rows = json.loads(table.to_json(orient="records", force_ascii=False))
        return Checked(rows, lambda place: f"{path} line {place + 1}")
