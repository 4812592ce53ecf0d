"""Splits of a dataset, which share no question."""

import hashlib
import random
from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

from stages.errors import MistakeError
from stages.records.record import Record, question

Item = TypeVar("Item")
Splits = dict[str, Iterable[Record]]  # eval, tune, train: each can be read once, and in this order


def arrange(records: Sequence[Record], seed: str | None = None) -> Sequence[int]:
    """Places of the records, each question once, shuffled by `seed`: files are often sorted, and eval is the front.

    A few numbers are all that is held of each, for the records may be more than the memory.
    """
    keys = array("Q", map(key, records))
    order = array("Q", range(len(keys)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    return array("Q", distinct(order, keys.__getitem__, set()))


def key(record: Record) -> int:
    """A number for each question."""
    return int.from_bytes(hashlib.blake2b(question(record).encode(), digest_size=8).digest(), "big")


def distinct(items: Iterable[Item], key: Callable[[Item], Hashable], seen: set[Hashable]) -> Iterator[Item]:
    """Each item whose key is not in `seen`, the first time it comes up."""
    for item in items:
        if (found := key(item)) not in seen:
            seen.add(found)
            yield item


def split(found: Sequence[Item], train: int | None, eval: int, tune: int, where: str) -> dict[str, Sequence[Item]]:
    """The first `eval` records for evaluation, the last `tune` for searching the merge, the rest to train on.

    Raises:
        MistakeError: the source has too few different records.
    """
    wanted = eval + tune + (1 if train is None else train)
    if len(found) < wanted:
        raise MistakeError(
            f"{where} has {len(found)} different records, but train, eval and tune together ask for {wanted};"
            " lower them or widen the task"
        )
    end = len(found) - tune
    return {"eval": found[:eval], "tune": found[end:], "train": found[eval:end][:train]}


def split_stream(records: Iterator[Record], train: int | None, eval: int, tune: int, where: str) -> Splits:
    """The first `eval` records, the next `tune`, then those to train on: a stream does not tell its length.

    Raises:
        MistakeError: once it is read, if it has too few different records.
    """

    def take(size: int | None) -> Iterator[Record]:
        missing = size or 1
        for record in islice(records, size):
            missing -= 1
            yield record
        if missing > 0 and size != 0:
            raise MistakeError(
                f"{where} ends {missing} different records too early for train, eval and tune together; lower them"
            )

    return {"eval": take(eval), "tune": take(tune), "train": take(train)}
