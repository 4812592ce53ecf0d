"""Several datasets as one (`source: mix`)."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Literal, Union

from pydantic import Field, field_validator

from stages.records.record import Record
from stages.records.scorers import Choice
from stages.records.source import Single, Source
from stages.records.splits import Sieve, Splits
from stages.settings.section import Name, mistake

if TYPE_CHECKING:
    Part = Single
else:
    Part = Annotated[Union[tuple(Source.choices())], Field(discriminator="source")]  # noqa: UP007  made at run time


class Mix(Source):
    """Datasets that are each defined in full and weighted; the splits are theirs, one after the other."""

    source: Literal["mix"]
    parts: dict[Name, Part] = Field(min_length=1)
    """The datasets by name, each with its `weight`."""

    @field_validator("parts")
    @classmethod
    def _weighted(cls, parts: dict[str, Single]) -> dict[str, Single]:
        for name, part in parts.items():
            if part.weight is None:
                raise mistake(f".{name}.weight is missing; add it")
        return parts

    @property
    def tuning(self) -> int:
        """How many records the tuning split has."""
        return sum(part.tune for part in self.parts.values())

    def weights(self) -> dict[str, float]:
        """Each part's share of what is seen in training; together they are 1."""
        total = sum(part.weight or 0 for part in self.parts.values())
        return {name: (part.weight or 0) / total for name, part in self.parts.items()}

    def splits(self, name: str, seed: int, where: str) -> Splits:
        """The parts' splits one after the other; what one part asks in eval or tune is in no other's train.

        A part has the splits of a dataset of its name and definition.
        """
        parts = {part: each.splits(part, seed, f"{where}.parts.{part}") for part, each in self.parts.items()}
        sieve = Sieve()

        def joined(split: str) -> Iterator[Record]:
            for part, splits in parts.items():
                records = (record | {"part": part} for record in splits.parts[split])
                yield from sieve.sift(records, split, splits.found[part])

        found = {part: splits.found[part] for part, splits in parts.items()}
        return Splits({split: joined(split) for split in ("eval", "tune", "train")}, found)

    def scorers(self, name: str, records: Iterable[Record], where: str) -> dict[str, Choice]:
        """Each part's own."""
        asked = list(records)
        chosen: dict[str, Choice] = {}
        for part, each in self.parts.items():
            own = [record for record in asked if record["part"] == part]
            chosen |= each.scorers(part, own, f"{where}.parts.{part}")
        return chosen
