"""Splits of a dataset, which share no question."""

import hashlib
import json
import random
from array import array
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TypeVar

from stages.errors import MistakeError
from stages.records.record import Record, is_empty
from stages.records.record import questions as asked_in
from stages.records.rows import Checked, Found

Item = TypeVar("Item")
LEARNED = ["text", "prompt", "completion", "messages", "input_ids", "tools", "chat_template_kwargs"]
LEARNED += ["loss_weights", "weight", "prompt_weight", "spans"]


@dataclass(frozen=True)
class Splits:
    """Records of a dataset, and what was found of its sources.

    Attributes:
        parts: eval, tune, train: each can be read once, and in this order.
        found: by the name of the dataset, or of each part of a mix; complete once the parts are read.
    """

    parts: dict[str, Iterable[Record]]
    found: dict[str, Found]


def split(
    records: Checked, seed: str | None, train: int | None, eval: int, tune: int, where: str
) -> dict[str, Iterable[Record]]:
    """Records of each split, shuffled by `seed`, for files are often sorted: eval is the front and tune the end.

    Each question of eval and tune is asked once. Train has the other questions, with all their answers, and no chat
    that asks one of eval and tune on the way. A few numbers are all that is held of each record, for there may be more
    than the memory.

    Raises:
        MistakeError: the records are too few, or mostly empty.
    """
    found, order = records.found, array("Q")
    questions, wholes = array("Q"), array("Q")
    earlier, ends = array("Q"), array("Q")  # questions before each chat's last, and where those of a record end
    for place, record in enumerate(records):
        *before, last = map(_hash, asked_in(record))
        questions.append(last)
        earlier.extend(before)
        ends.append(len(earlier))
        wholes.append(_hash(_whole(record)))
        if is_empty(record):
            found.skip(records.where(place))
        else:
            order.append(place)
    found.rows = len(questions)
    found.check(where)
    if seed is not None:
        random.Random(seed).shuffle(order)
    once = array("Q", distinct(order, wholes.__getitem__))
    asked = _asked(once, questions, eval)
    parts = {"eval": asked[:eval], "tune": asked[max(len(asked) - tune, 0) :]}
    held = {questions[place] for place in chain(*parts.values())}
    begun = {place for place in once if not held.isdisjoint(earlier[ends[place - 1] if place else 0 : ends[place]])}
    rest = array("Q", (place for place in once if questions[place] not in held and place not in begun))
    least = 1 if train is None else train
    if len(asked) < eval + tune or len(rest) < least:
        questioned = f" of {len(asked)} questions" if len(asked) < len(once) else ""
        raise MistakeError(
            f"{where} has {len(once)} different records{questioned}, but train, eval and tune together ask for"
            f" {eval + tune + least}; lower them or widen the task"
        )
    found.repeated, found.other_answers = len(order) - len(once), len(once) - len(rest) - eval - tune
    return {part: map(records.__getitem__, places) for part, places in (parts | {"train": rest[:train]}).items()}


def _asked(once: Sequence[int], questions: Sequence[int], eval: int) -> Sequence[int]:
    """A place for each question, such that those with several answers, all but one of which would be lost, are between
    the front and the end if there are enough others."""
    answers = Counter(map(questions.__getitem__, once))
    asked = array("Q", distinct(once, questions.__getitem__))
    single = array("Q", (place for place in asked if answers[questions[place]] == 1))
    several = array("Q", (place for place in asked if answers[questions[place]] > 1))
    return single[:eval] + several + single[eval:]


def distinct(items: Iterable[Item], key: Callable[[Item], Hashable]) -> Iterator[Item]:
    """Each item whose key is new, the first time it comes up."""
    seen = set()
    for item in items:
        if (found := key(item)) not in seen:
            seen.add(found)
            yield item


@dataclass
class Sieve:
    """What is left of records that come one by one: no question of a split in one after it, and no record twice.

    Attributes:
        asked: questions of eval and tune.
        seen: whole records.
    """

    asked: set[int] = field(default_factory=set)
    seen: set[int] = field(default_factory=set)

    def sift(self, records: Iterable[Record], part: str, found: Found) -> Iterator[Record]:
        """Records for a part of the splits; eval and tune ask each question once."""
        for record in records:
            whole, asked = _hash(_whole(record)), [*map(_hash, asked_in(record))]
            if whole in self.seen:
                found.repeated += 1
            elif not self.asked.isdisjoint(asked if part == "train" else asked[-1:]):
                found.other_answers += 1
            else:
                self.seen.add(whole)
                if part != "train":
                    self.asked.add(asked[-1])
                yield record


def split_stream(records: Checked, train: int | None, eval: int, tune: int, where: str) -> dict[str, Iterable[Record]]:
    """The first `eval` questions, the next `tune`, then records to train on: a stream does not tell its length.

    Raises:
        MistakeError: once it is read, if the records are too few, or mostly empty.
    """
    stream, sieve, found = _filled(records, where), Sieve(), records.found

    def take(part: str, size: int | None) -> Iterator[Record]:
        missing = 1 if size is None else size
        for record in islice(sieve.sift(stream, part, found), size):
            missing -= 1
            yield record
        found.check(where)
        if missing > 0:
            raise MistakeError(
                f"{where} ends {missing} different records too early for train, eval and tune together; lower them"
            )

    return {part: take(part, size) for part, size in (("eval", eval), ("tune", tune), ("train", train))}


def _filled(records: Checked, where: str) -> Iterator[Record]:
    """Records that are not empty; what is mostly so ends with a MistakeError, for it may not end at all."""
    found = records.found
    for place, record in enumerate(records):
        found.rows += 1
        if not is_empty(record):
            yield record
            continue
        found.skip(records.where(place))
        if found.empty % 1000 == 0:
            found.check(where)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _whole(record: Record) -> str:
    """All of a record that says what is learned: two that are the same in it are one."""
    return json.dumps([record.get(key) for key in LEARNED], default=str)
