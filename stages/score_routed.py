"""A routed model on every skill: `python -m stages.score_routed NAME`, of a name under `routers`.

Writes reports/answers/NAME.parquet as `stages.score` does, with the stage that was chosen for each record.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch

from stages.errors import run
from stages.files import ANSWERS, BASE, ROUTED, write_table
from stages.models.architecture import text_config
from stages.models.loading import compute_dtype, device, load_tokenizer
from stages.models.scoring import score
from stages.project.params import load_params
from stages.records.record import Record
from stages.routing.loading import load_routed
from stages.routing.router import hidden_states, prompt_ids
from stages.score import COLUMNS, ask_all


def main(name: str) -> None:
    """Score the routed model of that name: choose for every prompt, then answer those of each choice together."""
    params = load_params()
    torch.set_num_threads(params.thread_count)
    model, tokenizer = load_routed(ROUTED / name, BASE, compute_dtype(), device()), load_tokenizer()
    positions = getattr(text_config(model), "max_position_embeddings", None)
    choices = ["base", *model.config.routed["choices"]]

    def ask(records: Sequence[Record], scorers: Sequence[str]) -> list[dict[str, Any]]:
        prompts = [prompt_ids(record, tokenizer)[:positions] for record in records]
        with model.chosen(torch.tensor([0])):
            hidden = hidden_states(model, prompts, tokenizer.pad_token_id)
        numbers = model.decide(hidden.to(model.device)).tolist()
        rows: dict[int, dict[str, Any]] = {}
        for number in sorted(set(numbers)):
            places = [place for place, each in enumerate(numbers) if each == number]
            with model.chosen(torch.tensor([number])):
                own, names = [records[place] for place in places], [scorers[place] for place in places]
                found = score(model, tokenizer, own, names, params.evaluate)
            rows |= {place: row | {"choice": choices[number]} for place, row in zip(places, found, strict=True)}
        return [rows[place] for place in range(len(records))]

    table = ask_all(ask, name, positions)
    write_table(ANSWERS / f"{name}.parquet", table.astype(COLUMNS | {"choice": "str"}))


if __name__ == "__main__":
    run(main, *(sys.argv[1:2] or [""]))
