"""Records in jsonl files, read when they are asked for."""

import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from stages.errors import MistakeError
from stages.files import DATA
from stages.records.record import Record

BLANK = b"\xef\xbb\xbf \t\r\n"  # the mark that some programs begin a file of UTF-8 with is blank too


class Lines(Sequence[Record]):
    """Records of a jsonl file, parsed when they are asked for: memory holds where each line starts, and no more.

    Args:
        path: of the file.
        unpacked: a temporary file with the lines, if the file is packed.
    """

    def __init__(self, path: Path, unpacked: IO[bytes] | None = None) -> None:
        self._path, self._unpacked, self._starts, self._numbers = path, unpacked, array("Q"), array("Q")
        self._stored = Path(unpacked.name) if unpacked else path
        start = 0
        with self._stored.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip(BLANK):
                    self._starts.append(start)
                    self._numbers.append(number)
                start += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(len(self))[place]]
        with self._stored.open("rb") as lines:
            lines.seek(self._starts[place])
            line = lines.readline()
        try:
            return parse(line)
        except ValueError as error:  # of JSON, or of UTF-8
            reason = getattr(error, "msg", error)
            raise MistakeError(f"{self.where(place)} is not valid JSON ({reason}); correct that line") from None

    def where(self, place: int) -> str:
        """The file and line of one record."""
        return f"{self._path} line {self._numbers[place]}"


def parse(text: str | bytes) -> Any:
    """What JSON says; a ValueError where it is nested too deep, or says a key twice, of which Python takes the last."""
    try:
        return json.loads(text, object_pairs_hook=_mapping)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found


def load_split(name: str, part: str) -> Sequence[Record]:
    """Records of one split (`train`, `eval` or `tune`) of dataset `name`, as the data stage left them."""
    return Lines(DATA / name / f"{part}.jsonl")
