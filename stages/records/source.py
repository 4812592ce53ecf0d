"""What every dataset of params.yaml has in common: its sizes, what its rows are, and how it is split."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from stages.errors import MistakeError
from stages.records.chats import unlearned
from stages.records.record import Record
from stages.records.rows import Checked, Found, Rows
from stages.records.scorers import Choice, ScorerName, choose
from stages.records.shapes import PARTS, Columns, named, to_record
from stages.records.splits import Splits, split
from stages.settings.section import Chosen, mistake, nearest


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
    columns: Columns = {}
    """Which column is the `prompt`, `completion`, `messages` or `text` of a record, where their names do not tell; dots
    reach into a column, as in `answers.text.0` (docs/data.md). What is not named is left out."""
    format: Literal["auto", "chat", "plain"] = "auto"
    """Whether a prompt with its completion is put into the base's chat template: `auto` does so where it has one; in
    `plain` the completion follows the prompt as it is. Chats always are, and texts never."""
    chat_template_kwargs: dict[str, Any] = {}
    """Keywords of the chat template, such as `enable_thinking: false`; a record's own win."""
    learn: Literal["all", "last"] = "all"
    """Which answers of a chat are learned: each, or the last alone."""
    score: ScorerName = "auto"
    """How an answer is scored: `exact`, `contains`, `number` (the last one), `choice` (the first option), `chrf`,
    `rouge_l`, `task` (by a generated task), `loss` (not at all), or `module:function`, a function of your own that
    takes the answer, the reference and the record, and gives a number from 0 to 1. `auto` takes what fits."""
    score_sha256: str | None = None
    """Hash of the file of `score: module:function`. It pins the function, of which the name says nothing; a file that
    has changed is refused."""

    @field_validator("columns")
    @classmethod
    def _known(cls, columns: Columns) -> Columns:
        for part in columns:
            if part not in PARTS:
                raise mistake(f".{part} is no part of a record; {nearest(part, PARTS, 'known are')}")
        if columns and not named(columns):
            raise mistake(" should name text, messages, input_ids, or prompt and completion, and no two of these")
        return columns

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.format == "plain" and self.chat_template_kwargs:
            raise mistake(".chat_template_kwargs is of no use with format: plain; remove one of them")
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
    def rows(self, seed: str, where: str) -> Rows:
        """All rows, in the source's own order; `seed` is a text, for those that are generated.

        Raises:
            MistakeError: as `splits`.
        """

    def records(self, seed: str, where: str) -> Checked:
        """The rows as records, which are made when they are asked for."""
        rows = self.rows(seed, where)
        return Checked(rows, self._record, Found(rows.kind, wanted=set(self.columns.values())))

    def splits(self, name: str, seed: int, where: str) -> Splits:
        """The first `eval` records, the last `tune`, and those between to train on."""
        records = self.records(f"{seed}/{name}", where)
        shuffle = f"{seed}/{name}" if self.shuffled else None
        return Splits(split(records, shuffle, self.train, self.eval, self.tune, where), {name: records.found})

    def _record(self, row: Any, where: str, found: Found) -> Record:
        """A row as a record that says all that the dataset's settings say of it."""
        record = to_record(row, self.columns, where, found)
        if "text" in record or "input_ids" in record:
            if self.format == "chat" or self.chat_template_kwargs:
                raise MistakeError(
                    f"{where} is no chat, nor a prompt with its completion, which format: chat and chat_template_kwargs"
                    " are for; remove them, or name other columns with columns"
                )
            return record
        if "messages" in record and self.format == "plain":
            raise MistakeError(
                f"{where} is a chat, which needs a chat template and does not go with format: plain; remove format, or"
                " name a prompt and completion with columns"
            )
        if "messages" in record and self.learn == "last":
            record["messages"] = [*map(unlearned, record["messages"][:-1]), *record["messages"][-1:]]
        if keywords := self.chat_template_kwargs | record.get("chat_template_kwargs", {}):
            record["chat_template_kwargs"] = keywords
        return record if self.format == "auto" else record | {"format": self.format}

    def scorers(self, name: str, records: Iterable[Record], where: str) -> dict[str, Choice]:
        """One scorer for all records."""
        return {name: choose(self.score, self.score_sha256, records, where)}
