"""One model on every skill: `python -m stages.score NAME`, where NAME is `base`, a stage or `merged`.

Writes reports/scores/NAME.json: for each dataset the loss on its evaluation split, and the share of answers that are
right where there are answers to compare with.
"""

import sys

import torch
from tqdm import tqdm

from stages.errors import run
from stages.files import PICKED, REPORTS, read_json, write_json
from stages.models.loading import compute_dtype, device, load_model, load_tokenizer
from stages.models.scoring import score
from stages.project.params import load_params
from stages.records.lines import load_split
from stages.weights.checkpoint import open_model


def main(name: str) -> None:
    """Score the model of that name."""
    params = load_params()
    torch.set_num_threads(params.thread_count)
    model, tokenizer = load_model(open_model(name), compute_dtype(), device()), load_tokenizer()
    datasets = tqdm(read_json(PICKED / "data.json"), desc=f"score {name}", unit="dataset", dynamic_ncols=True)
    row = {dataset: score(model, tokenizer, load_split(dataset, "eval"), params.evaluate) for dataset in datasets}
    write_json(REPORTS / "scores" / f"{name}.json", row)


if __name__ == "__main__":
    run(main, *(sys.argv[1:2] or [""]))
