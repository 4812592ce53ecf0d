"""Rows of a source, and the records that they become when they are asked for."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stages.errors import MistakeError
from stages.records.record import Record, check, is_empty
from stages.records.template import check_template
from stages.settings.section import nearest

COUNTS = ("rows", "empty", "repeated", "other_answers")


@dataclass(frozen=True)
class Rows:
    """What a source holds, as it holds it.

    Attributes:
        rows: one for each record; a stream can be read once.
        where: tells the place of a row, counted from 0, for the sentence about a bad one.
        kind: of the source, in a word or two.
        gaps: whether null may stand for a key that a row does not have, as in a table with mappings in its columns.
    """

    rows: Any
    where: Callable[[int], str]
    kind: str
    gaps: bool = False


@dataclass
class Found:
    """What was read of a source, and what of it is in no split; complete once the splits are read.

    Attributes:
        kind: of the source.
        wanted: columns that params.yaml names and that no row has had yet.
        columns: names of all columns.
        shapes: the columns that were taken, by what the rows are.
        rows: how many were read.
        empty: how many of them have nothing to ask or nothing to learn.
        first_empty: the place of the first of these.
        repeated: how many are the same as another one.
        other_answers: how many have a question of `eval` or `tune`, and are not the one that is kept for it.
    """

    kind: str
    wanted: set[str] = field(default_factory=set)
    columns: set[str] = field(default_factory=set)
    shapes: dict[str, dict[str, None]] = field(default_factory=dict)
    rows: int = 0
    empty: int = 0
    first_empty: str = ""
    repeated: int = 0
    other_answers: int = 0

    def note(self, row: Record, shape: str, there: Iterable[str], taken: Iterable[str]) -> None:
        """Keep what a row is, which of the columns that it may have are there, and which of them hold something."""
        self.columns.update(row)
        self.wanted.difference_update(there)
        self.shapes.setdefault(shape, {}).update(dict.fromkeys(taken))

    def skip(self, where: str) -> None:
        """Count an empty row."""
        self.empty += 1
        self.first_empty = self.first_empty or where

    def told(self) -> str:
        """The kind, the shapes and the columns, such as `jsonl, chats (messages, tools)`."""
        return ", ".join([self.kind, *(f"{shape} ({', '.join(taken)})" for shape, taken in self.shapes.items())])

    def check(self, where: str) -> None:
        """Raise a MistakeError if a column is in no row, or if most rows are empty, so that another may be meant."""
        if self.rows and self.wanted:
            name = min(self.wanted)
            raise MistakeError(f"{where}.columns names {name!r}, which no row has; {nearest(name, self.columns)}")
        if 2 * self.empty > self.rows:
            raise MistakeError(
                f"{where} has nothing to ask or to learn in {self.empty} of {self.rows} rows, first in"
                f" {self.first_empty} ({self.told()}); fill them, or name other columns with columns"
            )


def report_of(found: Mapping[str, Found]) -> dict[str, Any]:
    """What was found in a dataset, or in each part of a mix, by name: counts of all, and what each was read as."""
    counts = {count: sum(getattr(each, count) for each in found.values()) for count in COUNTS}
    first = next((each.first_empty for each in found.values() if each.first_empty), None)
    return counts | {"first_empty": first, "read": {name: each.told() for name, each in found.items()}}


class Checked(Sequence[Record]):
    """Rows of a source as records, shaped and checked when they are asked for; one that is empty is not checked.

    Args:
        source: the rows.
        shape: what makes a record of a row; it is told the place, and notes in `found` what the row is.
        found: what was found so far.

    Attributes:
        where: tells the place of a record, counted from 0.
    """

    def __init__(self, source: Rows, shape: Callable[[Any, str, Found], Record], found: Found) -> None:
        self._source, self._shape = source, shape
        self.where, self.found = source.where, found

    def __len__(self) -> int:
        return len(self._source.rows)

    def __getitem__(self, place: Any) -> Any:
        return self._record(self._source.rows[place], place)

    def __iter__(self) -> Iterator[Record]:
        for place, row in enumerate(self._source.rows):  # the hub's tables are much faster so than row by row
            yield self._record(row, place)

    def _record(self, row: Any, place: int) -> Record:
        where = self.where(place)
        record = self._shape(without_gaps(row) if self._source.gaps else row, where, self.found)
        if is_empty(record):
            return record
        if "messages" in check(record, where):
            check_template(record, where)
        return record


def without_gaps(value: Any, depth: int = 0) -> Any:
    """A row of a table less the nulls deep in its lists: a mapping there has the keys of those of all rows together.

    Those of a message itself (`depth` 1) stay, for an empty content is null too.
    """
    if isinstance(value, dict):
        inner = depth + 1 if depth else 0
        return {key: without_gaps(item, inner) for key, item in value.items() if depth < 2 or item is not None}
    if isinstance(value, list):
        return [without_gaps(item, max(depth, 1)) for item in value]
    return value
