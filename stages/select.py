"""Choose the tokens of a dataset that are worth learning: `python -m stages.select NAME`.

Selective language modelling, Rho-1 (Lin et al. 2024, arXiv 2404.07965): a token is worth it where the model that will
be trained has a larger loss than a reference that has learned what is wanted; what is noise to both, and what is known
already, has no such excess. Rho-1 chooses again in every batch. Here the model that training starts from chooses once,
so that the choice is a dataset: versioned, to be looked at, and open to any stage.

Writes data/NAME, which has the splits of the dataset that it selects from (and its parts, if it is a mix) and new
weights for the training tokens, and reports/data/NAME.json.
"""

import json
import math
import shutil
import sys
from collections.abc import Sequence

import torch
from tqdm import tqdm

from stages.errors import run
from stages.files import DATA, REPORTS, publish, read_json, sha256, write_json
from stages.models.loading import compute_dtype, device, load_model, load_tokenizer
from stages.models.losses import pad, token_losses
from stages.project.params import load_params
from stages.records.lines import load_split
from stages.records.tokens import Example, encode
from stages.weights.checkpoint import open_checkpoint

BATCH = 16  # examples that pass through a model at once


def main(name: str) -> None:
    """Write the splits of selection `name` and how many tokens it kept."""
    settings = load_params()
    torch.set_num_threads(settings.thread_count)
    selection, tokenizer = settings.find("selections", name), load_tokenizer()
    longest = open_checkpoint("base", {}).base.architecture.positions or sys.maxsize
    records = load_split(selection.dataset, "train")
    found = [(record, example) for record in records for example in encode(record, tokenizer, longest)]
    examples = [example for _, example in found]
    before, reference = (
        losses(model, examples, tokenizer.pad_token_id) for model in (selection.parent, selection.reference)
    )
    excess = [mine - theirs for mine, theirs in zip(before, reference, strict=True)]
    chosen = choose(examples, excess, selection.keep)
    with publish(DATA / name) as folder:
        for split in ("eval", "tune"):
            shutil.copy(DATA / selection.dataset / f"{split}.jsonl", folder)
        if (mix := DATA / selection.dataset / "mix.json").exists():
            shutil.copy(mix, folder)
        with (folder / "train.jsonl").open("w", encoding="utf-8") as lines:
            for (record, _), example in zip(found, chosen, strict=True):
                part = {"part": record["part"]} if "part" in record else {}
                lines.write(json.dumps({"input_ids": example.ids, "loss_weights": example.weights} | part) + "\n")
    report = read_json(REPORTS / "data" / f"{selection.dataset}.json")[selection.dataset]
    report |= {"learned_tokens": count(examples), "kept_tokens": count(chosen)}
    report["sha256"] = sha256(DATA / name / f"{split}.jsonl" for split in ("train", "eval", "tune"))
    write_json(REPORTS / "data" / f"{name}.json", {name: report})


@torch.inference_mode()
def losses(name: str, examples: Sequence[Example], filler: int) -> list[torch.Tensor]:
    """Cross-entropy in nats of each example's learned tokens under checkpoint `name`, in their order, float32."""
    model = load_model(open_checkpoint(name, {}), compute_dtype(), device())
    found: dict[int, torch.Tensor] = {}
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    for start in tqdm(range(0, len(order), BATCH), desc=f"losses of {name}", unit="batch", dynamic_ncols=True):
        rows = order[start : start + BATCH]
        values, _ = token_losses(model, pad([examples[i] for i in rows], filler, device()))
        found |= zip(rows, values.cpu().split([len(learned(examples[i])) for i in rows]), strict=True)
    return [found[i] for i in range(len(examples))]


def choose(examples: Sequence[Example], excess: Sequence[torch.Tensor], keep: float) -> list[Example]:
    """The examples with weight 0 for all but the share `keep` of their learned tokens that have the largest excess.

    Among equals the first are kept. A token that is to be unlearned (its weight is negative) keeps its weight: that
    a model knows it is no reason to leave it.

    Args:
        examples: all of the dataset.
        excess: for each, that of its learned tokens, [learned].
        keep: of the tokens of the whole dataset.
    """
    places = [(row, place) for row, example in enumerate(examples) for place in learned(example)]
    values = torch.cat(list(excess))
    candidates = torch.tensor([examples[row].weights[place] > 0 for row, place in places])
    values[~candidates] = -math.inf
    kept = math.ceil(keep * int(candidates.sum()))
    weights = [list(example.weights) for example in examples]
    for index in values.sort(descending=True, stable=True).indices[kept:].tolist():
        row, place = places[index]
        if candidates[index]:
            weights[row][place] = 0.0
    return [Example(example.ids, row) for example, row in zip(examples, weights, strict=True)]


def learned(example: Example) -> list[int]:
    """Places of the tokens that count in the loss; nothing predicts the first."""
    return [place for place, weight in enumerate(example.weights) if weight and place]


def count(examples: Sequence[Example]) -> int:
    """How many tokens count in the loss."""
    return sum(len(learned(example)) for example in examples)


if __name__ == "__main__":
    run(main, *(sys.argv[1:2] or [""]))
