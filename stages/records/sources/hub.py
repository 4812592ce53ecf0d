"""One split of a dataset on the Hugging Face hub (`source: hub`)."""

from __future__ import annotations

import random
from typing import Any, Literal

from stages.errors import MistakeError, first_line
from stages.records.rows import Rows
from stages.records.source import Single
from stages.records.splits import Splits, split_stream

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

    def rows(self, seed: str, where: str) -> Rows:
        """All rows of the split; those of a stream are shuffled SHUFFLED at a time."""
        loaded = self._load(where)
        if self.stream:
            loaded = loaded.shuffle(seed=random.Random(seed).randrange(2**31), buffer_size=SHUFFLED)
        suffix = " of the stream" if self.stream else ""
        return Rows(loaded, lambda place: f"{where}: {self.id} row {place + 1}{suffix}", "hub", gaps=True)

    def splits(self, name: str, seed: int, where: str) -> Splits:
        """Of a stream the front, since it does not tell its length."""
        if not self.stream:
            return super().splits(name, seed, where)
        records = self.records(f"{seed}/{name}", where)
        return Splits(split_stream(records, self.train, self.eval, self.tune, where), {name: records.found})

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
