"""Fetch one dataset and split it: `python -m stages.data NAME`.

Writes data/NAME/train.jsonl, eval.jsonl and tune.jsonl, which share no question, and reports/data/NAME.json: how many
records each has, and what was found in the source. A mix has a file more, mix.json: each part's share of what is seen
in training.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stages.errors import run
from stages.files import DATA, REPORTS, publish, sha256, write_json
from stages.project.params import load_params
from stages.records.lines import Lines
from stages.records.record import Record, answer, question
from stages.records.rows import report_of
from stages.records.source import Source
from stages.records.sources.mix import Mix


def main(name: str) -> None:
    """Write the splits of dataset `name`, its counts, and how its answers are scored."""
    settings = load_params()
    dataset: Source = settings.find("datasets", name)
    where = f"params.yaml: datasets.{name}"
    splits = dataset.splits(name, settings.seed, where)
    report: dict[str, Any] = {}
    with publish(DATA / name) as folder:
        for part, records in splits.parts.items():
            report |= _write(records, folder / f"{part}.jsonl")
        report["scorers"] = dataset.scorers(name, Lines(folder / "eval.jsonl"), where)
        if isinstance(dataset, Mix):
            write_json(folder / "mix.json", dataset.weights())
    report |= report_of(splits.found)
    report["sha256"] = sha256(DATA / name / f"{part}.jsonl" for part in ("train", "eval", "tune"))
    write_json(REPORTS / "data" / f"{name}.json", {name: report})


def _write(records: Iterable[Record], path: Path) -> dict[str, int]:
    """Write the records of a split line by line; returns how many there are, with an answer, and their characters."""
    count = answers = characters = 0
    with path.open("w", encoding="utf-8") as lines:
        for record in records:
            lines.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
            reference = answer(record)
            count += 1
            answers += reference is not None
            characters += len(question(record)) + len(reference or "")
    return {path.stem: count, f"{path.stem}_answers": answers, f"{path.stem}_characters": characters}


if __name__ == "__main__":
    run(main, *(sys.argv[1:2] or [""]))
