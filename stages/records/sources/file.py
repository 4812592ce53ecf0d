"""Records in files on this machine (`source: file`)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from stages.errors import MistakeError
from stages.files import refuse_untracked, sha256
from stages.records.readers import read
from stages.records.rows import Rows
from stages.records.source import Single


class LocalFile(Single):
    """A file of jsonl, json, csv, tsv or parquet on this machine, packed or not, or a folder of `save_to_disk`."""

    source: Literal["file"]
    path: str
    """The .jsonl, .json, .csv, .tsv or .parquet file, maybe with .gz or .zst after it, or the folder."""
    split: str | None = None
    """Which one, where the path holds several, as a folder of a `DatasetDict` does."""
    sha256: str | None = None
    """Hash of the file. It pins the content, of which the path says nothing; one that has changed is refused."""

    def rows(self, seed: str, where: str) -> Rows:
        """All rows of the file."""
        path = Path(self.path)
        refuse_untracked(path, f"{where}.path")
        if not path.exists():
            raise MistakeError(f"{where}.path {self.path!r} is not there; correct the path")
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        if self.sha256 is not None and self.sha256 != (found := sha256(files)):
            raise MistakeError(f"{where}.sha256 is not that of {path}; if it was meant to change, write {found}")
        rows = read(path, self.split, where)
        if not len(rows.rows):
            raise MistakeError(f"{where}.path {self.path!r} holds no records; fill it, or correct the path")
        return rows
