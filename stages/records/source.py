"""What every dataset of params.yaml has in common: its sizes, and how it is split."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar, Self

from pydantic import Field, model_validator

from stages.records.record import Record
from stages.records.scorers import Choice, ScorerName, choose
from stages.records.splits import Splits, arrange, split
from stages.settings.section import Chosen, mistake


class Source(Chosen, ABC):
    """A dataset: where its records come from."""

    chooser = "source"

    source: str
    """Where the records come from."""

    @property
    @abstractmethod
    def tuning(self) -> int:
        """How many records the tuning split has."""

    @abstractmethod
    def splits(self, name: str, seed: int, where: str) -> Splits:
        """The splits, in an order that the seed and the dataset's name fix; few records are in memory at once.

        Args:
            name: of the dataset.
            seed: of params.yaml.
            where: where it stands in params.yaml, for sentences about mistakes.

        Raises:
            MistakeError: the source is not there or too small, or one of its records is malformed (its line is named).
        """

    @abstractmethod
    def scorers(self, name: str, records: Iterable[Record], where: str) -> dict[str, Choice]:
        """How answers are scored and why, by part of a mix; any other dataset is its own part.

        Args:
            name: of the dataset.
            records: of the evaluation split.
            where: where it stands in params.yaml, for sentences about mistakes.

        Raises:
            MistakeError: the key `score` does not go with the records.
        """


class Single(Source):
    """A dataset of its own, or a part of a mix."""

    shuffled: ClassVar[bool] = True  # files are often sorted, and the evaluation split is the front

    train: int | None = Field(default=None, ge=0)
    """Records to train on; without it, all that `eval` and `tune` leave; 0 for a guard, which no stage learns."""
    eval: int = Field(gt=0)
    """Records that models are scored on."""
    tune: int = Field(default=0, ge=0)
    """Records for the search of a merge and for the best step."""
    weight: float | None = Field(default=None, gt=0)
    """In a mix, and there alone: the share of every batch, relative to the other parts."""
    score: ScorerName = "auto"
    """How an answer is scored: `exact`, `contains`, `number` (the last one), `choice` (the first option), `chrf`,
    `rouge_l`, `task` (by a generated task), `loss` (not at all), or `module:function`, a function of your own that
    takes the answer, the reference and the record, and gives a number from 0 to 1. `auto` takes what fits."""
    score_sha256: str | None = None
    """Hash of the file of `score: module:function`. It pins the function, of which the name says nothing; a file that
    has changed is refused."""

    @model_validator(mode="after")
    def _pins_a_function(self) -> Self:
        if self.score_sha256 is not None and ":" not in self.score:
            raise mistake(
                f".score_sha256 is of use with score: module:function alone, and score is {self.score}; remove it"
            )
        return self

    @property
    def tuning(self) -> int:
        """How many records the tuning split has."""
        return self.tune

    @abstractmethod
    def records(self, seed: str, where: str) -> Sequence[Record]:
        """All records, in the source's own order; `seed` is a text, for those that are generated.

        Raises:
            MistakeError: as `splits`.
        """

    def splits(self, name: str, seed: int, where: str) -> Splits:
        """The first `eval` records, the last `tune`, and those between to train on."""
        records = self.records(f"{seed}/{name}", where)
        order = arrange(records, f"{seed}/{name}" if self.shuffled else None)
        parts = split(order, self.train, self.eval, self.tune, where)
        return {part: map(records.__getitem__, places) for part, places in parts.items()}

    def scorers(self, name: str, records: Iterable[Record], where: str) -> dict[str, Choice]:
        """One scorer for all records."""
        return {name: choose(self.score, self.score_sha256, records, where)}
