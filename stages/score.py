"""One model on every skill: `python -m stages.score NAME`, where NAME is `base`, a stage or `merged`.

Writes reports/answers/NAME.parquet: every record of every evaluation split, with what the model says and its loss.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from stages.errors import MistakeError, placed, run
from stages.files import ANSWERS, PICKED, read_json, rounded, write_table
from stages.models.architecture import text_config
from stages.models.loading import compute_dtype, device, load_model, load_tokenizer
from stages.models.scoring import score
from stages.project.params import load_params
from stages.records.lines import load_split
from stages.records.record import Record
from stages.records.scorers import scorers_of
from stages.weights.checkpoint import open_model

COLUMNS = {
    "dataset": "str",
    "record": "int64",  # line of data/DATASET/eval.jsonl, from 1
    "question": "str",
    "reference": "str",
    "answer": "str",
    "end": "str",  # stop, cut by max_new_tokens, or unasked: the question is longer than the model reads
    "scorer": "str",
    "score": "float64",  # 0 to 1
    "loss": "float64",  # Σwᵢlᵢ over the record's tokens, nats
    "weight": "float64",  # Σ|wᵢ|
}

Ask = Callable[[Sequence[Record], Sequence[str]], list[dict[str, Any]]]


def main(name: str) -> None:
    """Score the model of that name."""
    params = load_params()
    torch.set_num_threads(params.thread_count)
    model, tokenizer = load_model(open_model(name), compute_dtype(), device()), load_tokenizer()

    def ask(records: Sequence[Record], scorers: Sequence[str]) -> list[dict[str, Any]]:
        return score(model, tokenizer, records, scorers, params.evaluate)

    table = ask_all(ask, name, getattr(text_config(model), "max_position_embeddings", None))
    write_table(ANSWERS / f"{name}.parquet", table.astype(COLUMNS))


def ask_all(ask: Ask, name: str, positions: int | None) -> pd.DataFrame:
    """Every record of every evaluation split with what `ask` makes of it, in COLUMNS and maybe more.

    Args:
        ask: as `stages.models.scoring.score`, given the records of a dataset and the scorer of each.
        name: of the model.
        positions: tokens that it reads, for a sentence.

    Raises:
        MistakeError: a dataset has no record that the model could answer.
    """
    chosen = read_json(PICKED / "scorers.json")
    records = {dataset: load_split(dataset, "eval") for dataset in chosen}
    scorers = {dataset: scorers_of(dataset, chosen[dataset], records[dataset]) for dataset in chosen}
    rows: list[dict[str, Any]] = []
    for dataset in tqdm(chosen, desc=f"score {name}", unit="dataset", dynamic_ncols=True):
        with placed(f"params.yaml: datasets.{dataset}: "):
            found = ask(records[dataset], scorers[dataset])
        if not any(row["weight"] for row in found):
            raise MistakeError(
                f"params.yaml: datasets.{dataset} has no evaluation record whose answer base.model reads to, of at most"
                f" {positions} tokens with the question; take shorter ones"
            )
        rows += [{"dataset": dataset, "record": number, **row} for number, row in enumerate(found, start=1)]
    table = pd.DataFrame(rounded(rows))
    return table.reindex(columns=[*COLUMNS, *(name for name in table if name not in COLUMNS)])


if __name__ == "__main__":
    run(main, *(sys.argv[1:2] or [""]))
