"""Fetch one dataset and split it: `python -m stages.data NAME`.

Writes data/NAME/train.jsonl, eval.jsonl and tune.jsonl, which share no question, and reports/data/NAME.json. With
`--show 3` it writes nothing and prints the first 3 training examples token by token, with their weights.
"""

import argparse
import hashlib
import json
import math
import os
import random
import re
import sys
import warnings
from array import array
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from stages import params
from stages.errors import MistakeError, run
from stages.files import BASE, DATA, REPORTS, publish, sha256, write_json
from stages.records import Example, Lines, Record, answer, check, encode, load_split, question

SHUFFLED = 10_000  # rows of a stream that are shuffled together
GREENS, REDS = (194, 157, 120, 83, 46), (224, 217, 210, 203, 196)  # ANSI colours of weights, from small to large

Item = TypeVar("Item")
Splits = dict[str, Iterable[Record]]  # eval, tune, train: each can be read once, and in this order


def main(name: str) -> None:
    """Write the splits of dataset `name` and its counts."""
    settings = params.load()
    dataset = find(name, settings)
    counts, characters = {}, {}
    with publish(DATA / name) as folder:
        for part, records in make(dataset, name, settings.seed, f"params.yaml: datasets.{name}").items():
            counts[part], characters[part] = _write(records, folder / f"{part}.jsonl")
    parts = ("train", "eval", "tune")
    report: dict[str, Any] = {part: counts[part] for part in parts}
    report |= {f"{part}_characters": characters[part] for part in parts}
    report["sha256"] = sha256(DATA / name / f"{part}.jsonl" for part in parts)
    write_json(REPORTS / "data" / f"{name}.json", {name: report})


def find(name: str, settings: params.Params) -> params.Dataset:
    """The dataset of that name, or a MistakeError that lists the known ones."""
    if name not in settings.datasets:
        raise MistakeError(f"params.yaml: datasets has no {name!r}; it has {', '.join(settings.datasets)}")
    return settings.datasets[name]


def make(dataset: params.Dataset, name: str, seed: int, where: str) -> Splits:
    """Splits of any dataset, in an order that the seed and its name fix; few records are in memory at once.

    Raises:
        MistakeError: the source is not there or too small, or one of its records is malformed (its line is named).
    """
    if isinstance(dataset, params.Mix):
        parts = dataset.parts.items()
        return mix({part: make(each, part, seed, f"{where}.parts.{part}") for part, each in parts})
    if isinstance(dataset, params.Hub) and dataset.stream:
        return split_stream(from_stream(dataset, f"{seed}/{name}", where), dataset, where)
    if isinstance(dataset, params.ReasoningGym):
        records: Sequence[Record] = from_reasoning_gym(dataset, f"{seed}/{name}", where)
        order = arrange(records)
    else:
        records = from_file(dataset, where) if isinstance(dataset, params.LocalFile) else from_hub(dataset, where)
        order = arrange(records, f"{seed}/{name}")
    return {part: map(records.__getitem__, places) for part, places in split(order, dataset, where).items()}


def mix(parts: dict[str, Splits]) -> Splits:
    """The parts' splits one after the other; what one part asks in eval or tune is in no other's train."""
    seen: set[Hashable] = set()

    def joined(split: str) -> Iterator[Record]:
        for name, splits in parts.items():
            yield from (record | {"part": name} for record in splits[split])

    return {split: distinct(joined(split), key, seen) for split in ("eval", "tune", "train")}


class Checked(Sequence[Record]):
    """Rows of a source as records, checked when they are asked for.

    Args:
        rows: the rows.
        where: tells the place of a row, for the sentence about a bad one.
    """

    def __init__(self, rows: Sequence[Any], where: Callable[[int], str]) -> None:
        self._rows, self._where = rows, where

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: Any) -> Any:
        return check(self._rows[place], self._where(place))

    def __iter__(self) -> Iterator[Record]:
        for place, row in enumerate(self._rows):  # the hub's tables are much faster so than row by row
            yield check(row, self._where(place))


def from_reasoning_gym(dataset: params.ReasoningGym, seed: str, where: str) -> list[Record]:
    """Generated tasks: up to four times as many as are wanted, for some questions come up twice."""
    warnings.filterwarnings("ignore", category=SyntaxWarning)  # from a dependency, when it is first compiled
    import reasoning_gym

    try:
        tasks = list(
            reasoning_gym.create_dataset(
                dataset.task,
                size=4 * (dataset.train + dataset.eval + dataset.tune),
                seed=random.Random(seed).randrange(2**31),
                **dataset.config,
            )
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise MistakeError(
            f"{where}: reasoning_gym does not make task {dataset.task!r} with this config"
            f" ({str(error).strip() or type(error).__name__}); see its list of tasks and their settings"
        ) from None
    return [
        {
            "prompt": entry["question"].rstrip() + "\n",
            "completion": str(entry["answer"]),
            "task": dataset.task,
            "entry": entry,
        }
        for entry in tasks
    ]


def from_file(dataset: params.LocalFile, where: str) -> Checked:
    """Records of a jsonl, csv or parquet file; one that its hash does not pin any more is refused."""
    path = Path(dataset.path)
    if not path.is_file():
        raise MistakeError(f"{where}.path {dataset.path!r} is not a file; correct the path")
    if dataset.sha256 is not None and dataset.sha256 != (found := sha256([path])):
        raise MistakeError(f"{where}.sha256 is not that of {path}; if it was meant to change, write {found}")
    if path.suffix == ".jsonl":
        lines = Lines(path)
        return Checked(lines, lines.where)
    if path.suffix not in (".csv", ".parquet"):
        raise MistakeError(f"{where}.path {dataset.path!r} is no .jsonl, .csv or .parquet file; convert it")
    import pandas

    if path.suffix == ".csv":
        # The header is line 1, so the first record is on line 2.
        table = pandas.read_csv(path, dtype=str, keep_default_na=False)
        return Checked(table.to_dict("records"), lambda place: f"{path} line {place + 2}")
    # The round trip through JSON turns numpy's nested arrays into plain lists.
    table = pandas.read_parquet(path)
    rows = json.loads(table.to_json(orient="records", force_ascii=False))
    return Checked(rows, lambda place: f"{path} line {place + 1}")


def from_hub(dataset: params.Hub, where: str) -> Checked:
    """Records of one split of a hub dataset at its revision (a local folder in place of an id works too)."""
    return Checked(_load(dataset, where), lambda place: f"{where}: {dataset.id} row {place + 1}")


def from_stream(dataset: params.Hub, seed: str, where: str) -> Iterator[Record]:
    """The same as they come from the hub, SHUFFLED rows at a time, each question once."""
    number = random.Random(seed).randrange(2**31)
    rows = _load(dataset, where).shuffle(seed=number, buffer_size=SHUFFLED)
    records = (check(row, f"{where}: {dataset.id} row {place} of the stream") for place, row in enumerate(rows, 1))
    return distinct(records, key, set())


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


def split(found: Sequence[Item], dataset: params.Single, where: str) -> dict[str, Sequence[Item]]:
    """The first `eval` records for evaluation, the last `tune` for searching the merge, the rest to train on.

    Raises:
        MistakeError: the source has too few different records.
    """
    wanted = dataset.eval + dataset.tune + (dataset.train or 1)
    if len(found) < wanted:
        raise MistakeError(
            f"{where} has {len(found)} different records, but train, eval and tune together ask for {wanted};"
            " lower them or widen the task"
        )
    end = len(found) - dataset.tune
    return {"eval": found[: dataset.eval], "tune": found[end:], "train": found[dataset.eval : end][: dataset.train]}


def split_stream(records: Iterator[Record], dataset: params.Hub, where: str) -> Splits:
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

    return {"eval": take(dataset.eval), "tune": take(dataset.tune), "train": take(dataset.train)}


def show(name: str, count: int) -> None:
    """Print the first training examples of a dataset or selection `name` token by token, with their weights.

    Raises:
        MistakeError: the base, which has the tokenizer, or the selection is not there.
    """
    settings = params.load()
    dataset = find(settings.selected_from(name), settings)
    if name in settings.selections and not (DATA / name).is_dir():
        raise MistakeError(f"{DATA / name} is missing, for it has not been chosen yet; run dvc repro select@{name}")
    if not BASE.is_dir():
        raise MistakeError(f"{BASE} is missing, and with it the tokenizer; run dvc repro base")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    records = list(islice(_training(dataset, name, settings.seed), count))
    examples = [encode(record, tokenizer, sys.maxsize) for record in records]
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    scale = max(abs(weight) for example in examples for weight in _counted(example)) if coloured else None
    print(legend(scale))
    for number, (record, example) in enumerate(zip(records, examples, strict=True), start=1):
        part = f" of {record['part']}" if isinstance(dataset, params.Mix) else ""
        texts = [str(tokenizer.decode([token])) for token in example.ids]
        print(f"\nexample {number}{part}, {summary([example])}\n{draw(texts, _counted(example), scale)}")
    print(f"\ntogether {summary(examples)}")


def legend(scale: float | None) -> str:
    """What colours mean where there are any: the strongest is a weight of `scale`."""
    if not scale:
        return "⟨weight⟩ of the tokens that follow; · between two of the same weight"
    steps = [scale * step / len(GREENS) for step in range(-len(REDS), len(GREENS) + 1)]
    return "weight up to " + "".join(paint(f" {step:.3g} ", step, scale) for step in steps)


def draw(texts: list[str], weights: list[float], scale: float | None) -> str:
    """Tokens with dots between those of the same weight, which is a colour or, without a scale, a number."""
    drawn, before = "", None
    for text, weight in zip(texts, weights, strict=True):
        if weight != before:
            drawn += "" if scale else f"⟨{weight:g}⟩"
        elif not drawn.endswith("\n"):
            drawn += "·"
        drawn += paint(_visible(text), weight, scale) if scale else _visible(text)
        if "\n" in text:
            drawn += "\n"
        before = weight
    return drawn.rstrip("\n")


def paint(text: str, weight: float, scale: float) -> str:
    """Text on green, or on red if the weight is negative; the stronger, the larger the weight beside `scale`."""
    if not weight:
        return text
    shade = math.ceil(len(GREENS) * (abs(weight) / scale))
    return f"\x1b[38;5;16;48;5;{(GREENS if weight > 0 else REDS)[shade - 1]}m{text}\x1b[0m"


def summary(examples: list[Example]) -> str:
    """How many tokens there are, and how many of them count in the loss."""
    tokens = sum(len(example.ids) for example in examples)
    learned = sum(weight != 0 for example in examples for weight in _counted(example))
    return f"{tokens} tokens, {learned} of them supervised ({100 * learned / tokens:.0f} %)"


def _training(dataset: params.Dataset, name: str, seed: int) -> Iterator[Record]:
    """Training records as the data stage left them, or made here if it has not run."""
    if (DATA / name).is_dir():
        return iter(load_split(name, "train"))
    splits = make(dataset, name, seed, f"params.yaml: datasets.{name}")
    for part in ("eval", "tune"):
        deque(splits[part], maxlen=0)  # a stream gives them first
    return iter(splits["train"])


def _counted(example: Example) -> list[float]:
    """Weights as they count: nothing predicts the first token."""
    return [0.0, *example.weights[1:]]


def _visible(text: str) -> str:
    """Text without characters that a terminal would obey."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text.replace("\n", "↵"))


def _write(records: Iterable[Record], path: Path) -> tuple[int, int]:
    """Write records line by line; returns how many there are, and their characters."""
    count = characters = 0
    with path.open("w", encoding="utf-8") as lines:
        for record in records:
            lines.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
            count += 1
            characters += len(question(record)) + len(answer(record) or "")
    return count, characters


def _load(dataset: params.Hub, where: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(
            dataset.id,
            name=dataset.config,
            revision=dataset.revision,
            split=dataset.split,
            streaming=dataset.stream,
        )
    except Exception as error:  # the library raises its own, the hub's, and the network's
        reason = str(error).strip().splitlines()[0]
        raise MistakeError(f"{where}.id {dataset.id!r} does not load ({reason}); correct the id or split") from None


def _command() -> None:
    parser = argparse.ArgumentParser(prog="python -m stages.data", description="Fetch one dataset and split it.")
    parser.add_argument("name", help="a dataset of params.yaml")
    parser.add_argument("--show", type=int, metavar="N", help="write nothing; print N training examples by token")
    wanted = parser.parse_args()
    if wanted.show is None:
        main(wanted.name)
    elif wanted.show > 0:
        show(wanted.name, wanted.show)
    else:
        parser.error("--show takes a number from 1")


if __name__ == "__main__":
    run(_command)
