"""Fetch one dataset and split it: `python -m stages.data NAME`.

Writes data/NAME/train.jsonl, eval.jsonl and tune.jsonl, which share no question, and reports/data/NAME.json.
"""

import json
import random
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from stages import params
from stages.errors import MistakeError, run
from stages.files import DATA, REPORTS, publish, sha256, write_json, write_text
from stages.records import Record, answer, check, question


def main(name: str) -> None:
    """Write the splits of dataset `name` and its counts."""
    settings = params.load()
    dataset = settings.datasets[name]
    where = f"params.yaml: datasets.{name}"
    splits = split(distinct(read(dataset, f"{settings.seed}/{name}", where)), dataset, where)
    with publish(DATA / name) as folder:
        for part, records in splits.items():
            lines = [json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records]
            write_text(folder / f"{part}.jsonl", "".join(lines))
    counts: dict[str, Any] = {part: len(records) for part, records in splits.items()}
    counts |= {f"{part}_characters": sum(map(_characters, records)) for part, records in splits.items()}
    counts["sha256"] = sha256(DATA / name / f"{part}.jsonl" for part in splits)
    write_json(REPORTS / "data" / f"{name}.json", {name: counts})


def read(dataset: params.Dataset, seed: str, where: str) -> Iterator[Record]:
    """Checked records of any source, in an order that `seed` fixes.

    Raises:
        MistakeError: the source is not there, or one of its records is malformed (its line is named).
    """
    if isinstance(dataset, params.ReasoningGym):
        return from_reasoning_gym(dataset, seed, where)
    if isinstance(dataset, params.LocalFile):
        rows = from_file(dataset, where)
        return _shuffled((check(row, f"{dataset.path} line {number}") for number, row in rows), seed)
    rows = enumerate(from_hub(dataset, where), start=1)
    return _shuffled((check(row, f"{where}: {dataset.id} row {number}") for number, row in rows), seed)


def from_reasoning_gym(dataset: params.ReasoningGym, seed: str, where: str) -> Iterator[Record]:
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
    for entry in tasks:
        yield {
            "prompt": entry["question"].rstrip() + "\n",
            "completion": str(entry["answer"]),
            "task": dataset.task,
            "entry": entry,
        }


def from_file(dataset: params.LocalFile, where: str) -> Iterator[tuple[int, Any]]:
    """Line number and content of every record of a jsonl, csv or parquet file."""
    import pandas

    path = Path(dataset.path)
    if not path.is_file():
        raise MistakeError(f"{where}.path {dataset.path!r} is not a file; correct the path")
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _parse(line, f"{dataset.path} line {number}")
    elif path.suffix == ".csv":
        # The header is line 1, so the first record is on line 2.
        table = pandas.read_csv(path, dtype=str, keep_default_na=False)
        yield from enumerate(table.to_dict("records"), start=2)
    elif path.suffix == ".parquet":
        # The round trip through JSON turns numpy's nested arrays into plain lists.
        table = pandas.read_parquet(path)
        yield from enumerate(json.loads(table.to_json(orient="records", force_ascii=False)), start=1)
    else:
        raise MistakeError(f"{where}.path {dataset.path!r} is no .jsonl, .csv or .parquet file; convert it")


def from_hub(dataset: params.Hub, where: str) -> Iterable[Any]:
    """Rows of one split of a hub dataset at its revision (a local folder in place of an id works too)."""
    import datasets

    try:
        return datasets.load_dataset(dataset.id, name=dataset.config, revision=dataset.revision, split=dataset.split)
    except Exception as error:  # the library raises its own, the hub's, and the network's
        reason = str(error).strip().splitlines()[0]
        raise MistakeError(f"{where}.id {dataset.id!r} does not load ({reason}); correct the id or split") from None


def distinct(records: Iterable[Record]) -> Iterator[Record]:
    """Each question once, the first time it comes up."""
    seen = set()
    for record in records:
        if (key := question(record)) not in seen:
            seen.add(key)
            yield record


def split(records: Iterator[Record], dataset: params.Dataset, where: str) -> dict[str, list[Record]]:
    """The first `eval` records for evaluation, the last `tune` for searching the merge, the rest to train on.

    Raises:
        MistakeError: the source has too few different records.
    """
    found = list(records)
    wanted = dataset.eval + dataset.tune + (dataset.train or 1)
    if len(found) < wanted:
        raise MistakeError(
            f"{where} has {len(found)} different records, but train, eval and tune together ask for {wanted};"
            " lower them or widen the task"
        )
    evaluation, rest, tuning = (
        found[: dataset.eval],
        found[dataset.eval : len(found) - dataset.tune],
        found[len(found) - dataset.tune :],
    )
    return {"train": rest[: dataset.train], "eval": evaluation, "tune": tuning}


def _shuffled(records: Iterable[Record], seed: str) -> Iterator[Record]:
    """Shuffle, for files are often sorted and the eval split is taken from the front."""
    shuffled = list(records)
    random.Random(seed).shuffle(shuffled)
    return iter(shuffled)


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise MistakeError(f"{where} is not valid JSON ({error.msg}); correct that line") from None


def _characters(record: Record) -> int:
    return len(question(record)) + len(answer(record) or "")


if __name__ == "__main__":
    run(main, *sys.argv[1:])
