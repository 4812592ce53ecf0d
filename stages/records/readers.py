"""Files of rows, read by what their name and content say they are."""

import shutil
from json import JSONDecodeError
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Any

from stages.errors import MistakeError, first_line
from stages.records.lines import BLANK, Lines, parse
from stages.records.rows import Rows
from stages.records.tables import decode, read_csv, read_parquet
from stages.settings.section import nearest

PACKED = {".gz": "gzip", ".zst": "zstd"}
JSON = (".jsonl", ".ndjson", ".json")
KINDS = (*JSON, ".csv", ".tsv", ".parquet")


def read(path: Path, split: str | None, where: str) -> Rows:
    """Rows of a file, or of a folder that `datasets` saved.

    Args:
        path: of the file or folder.
        split: which one, of several.
        where: of the dataset in params.yaml, for the sentence about a mistake there.

    Raises:
        MistakeError: it is of no kind that is read, is not what its name says, or does not hold that split.
    """
    if path.is_dir():
        return _read_folder(path, split, where)
    packed = PACKED.get(path.suffix.lower())
    kind = Path(path.stem if packed else path.name).suffix.lower()
    if kind not in KINDS:
        known = f"{', '.join(KINDS[:-1])} or {KINDS[-1]}"
        raise MistakeError(
            f"{where}.path {str(path)!r} is no {known} file, nor one of them with .gz or .zst; convert it"
        )
    unpacked = _unpack(path, packed) if packed else None
    stored = Path(unpacked.name) if unpacked else path
    if kind in JSON and _is_document(stored, kind):
        return _read_document(path, stored, split, where)
    _choose({}, split, where)
    if kind in JSON:
        lines = Lines(path, unpacked)
        return Rows(lines, lines.where, "jsonl")
    return read_parquet(path, stored) if kind == ".parquet" else read_csv(path, stored, kind)


def _unpack(path: Path, packed: str) -> IO[bytes]:
    """A temporary file with what a packed one holds; it is gone once it is no longer referred to."""
    import pyarrow

    file = NamedTemporaryFile()  # noqa: SIM115  the rows are read from it later
    try:
        with pyarrow.input_stream(str(path), compression=packed) as stream:
            shutil.copyfileobj(stream, file, 1 << 20)
    except OSError as error:
        raise MistakeError(f"{path} is no whole {packed} file ({first_line(error)}); write it anew") from None
    file.flush()
    return file


def _choose(parts: dict[str, Any], split: str | None, where: str) -> Any:
    """One of several parts by its name, or the only one; None where there are none and none is asked for."""
    if split is None and len(parts) > 1:
        raise MistakeError(f"{where}.split is missing, for path holds several; choose one of {', '.join(parts)}")
    if split is None:
        return next(iter(parts.values()), None)
    if split not in parts:
        raise MistakeError(f"{where}.split {split!r} is not in what path holds; {nearest(split, parts)}")
    return parts[split]


def _is_document(file: Path, kind: str) -> bool:
    """Whether the whole file is one value of JSON, and not each line."""
    with file.open("rb") as lines:
        filled = filter(None, (line.strip(BLANK) for line in lines))
        first = next(filled, b"")
        is_last = next(filled, None) is None
    try:
        parse(first)
    except ValueError:
        return bool(first) and (kind == ".json" or first == b"{" or first.startswith(b"["))
    return is_last and (kind == ".json" or first.startswith(b"["))


def _read_document(path: Path, file: Path, split: str | None, where: str) -> Rows:
    """The rows of a list, or of the one list or the chosen one that a mapping holds."""
    try:
        content = parse(decode(path, file.read_bytes()))
    except ValueError as error:
        place, reason = (f" line {error.lineno}", error.msg) if isinstance(error, JSONDecodeError) else ("", error)
        raise MistakeError(
            f"{path}{place} is not valid JSON ({reason}); correct it: one list of records, or a record on each line"
        ) from None
    rows = content
    if isinstance(content, dict):
        lists = {name: value for name, value in content.items() if isinstance(value, list) and value}
        lists = {name: value for name, value in lists.items() if all(isinstance(each, dict) for each in value)}
        rows = _choose(lists, split, where)
    else:
        _choose({}, split, where)
    if not isinstance(rows, list):
        raise MistakeError(f"{path} holds no list of records; write one, as orient='records' of pandas does")
    return Rows(rows, lambda place: f"{path} record {place + 1}", "json")


def _read_folder(path: Path, split: str | None, where: str) -> Rows:
    """The rows of a `Dataset`, or of one in a `DatasetDict`, which stay on disk."""
    import datasets

    try:
        rows = datasets.load_from_disk(str(path))
    except Exception as error:  # the library trusts what it has saved
        raise MistakeError(
            f"{where}.path {str(path)!r} is no folder of save_to_disk ({first_line(error)}); name one of its files"
        ) from None
    if isinstance(rows, datasets.DatasetDict):
        rows = _choose(dict(rows), split, where)
    else:
        _choose({}, split, where)
    return Rows(rows, lambda place: f"{path} row {place + 1}", "save_to_disk", gaps=True)
