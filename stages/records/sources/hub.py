"""One split of a dataset on the Hugging Face hub (`source: hub`)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, Literal

from stages.errors import MistakeError, first_line
from stages.records.record import Checked, Record, check
from stages.records.source import Single
from stages.records.splits import Splits, distinct, key, split_stream

SHUFFLED = 10_000  # rows of a stream that are shuffled together


class Hub(Single):
    """A dataset at a fixed revision; a local folder in place of the id works too."""

    source: Literal["hub"]
    id: str
    """Of the dataset, `owner/name`."""
    revision: str
    """The commit to read."""
    config: str | None = None
    """Which configuration of the dataset."""
    split: str = "train"
    """Which of its own splits to read."""
    stream: bool = False
    """Read no more of it than the splits need, in place of downloading it and choosing from the whole."""

    def records(self, seed: str, where: str) -> Checked:
        """All records of the split."""
        return Checked(self._load(where), lambda place: f"{where}: {self.id} row {place + 1}")

    def splits(self, name: str, seed: int, where: str) -> Splits:
        """Of a stream the front, since it does not tell its length."""
        if not self.stream:
            return super().splits(name, seed, where)
        records = self._stream(f"{seed}/{name}", where)
        return split_stream(records, self.train, self.eval, self.tune, where)

    def _stream(self, seed: str, where: str) -> Iterator[Record]:
        """Records as they come from the hub, SHUFFLED rows at a time, each question once."""
        number = random.Random(seed).randrange(2**31)
        rows = self._load(where).shuffle(seed=number, buffer_size=SHUFFLED)
        records = (check(row, f"{where}: {self.id} row {place} of the stream") for place, row in enumerate(rows, 1))
        return distinct(records, key, set())

    def _load(self, where: str) -> Any:
        import datasets

        try:
            return datasets.load_dataset(
                self.id, name=self.config, revision=self.revision, split=self.split, streaming=self.stream
            )
        except Exception as error:  # the library raises its own, the hub's, and the network's
            raise MistakeError(
                f"{where}.id {self.id!r} does not load ({first_line(error)}); correct the id or split"
            ) from None
