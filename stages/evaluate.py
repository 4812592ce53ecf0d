"""Every model on every skill: `python -m stages.evaluate`.

Rows are the base, each stage with its effective weights, and the merged model; columns are the eval splits.
Each cell has the loss in nats per supervised token and, where there is an answer to compare with, the share
of answers that are right. Writes reports/evaluation.json.
"""

from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages import params
from stages.errors import run
from stages.files import MERGED, REPORTS, write_json
from stages.model import compute_dtype, load_model, load_tokenizer, supervised_losses
from stages.records import Record, answer, encode, encode_question, load_split
from stages.weights.checkpoint import Checkpoint, VirtualCheckpoint, open_stages

Cell = dict[str, float]


def main() -> None:
    """Fill the matrix and write it with each stage's retention in the merged model."""
    settings = params.load()
    torch.set_num_threads(settings.threads)
    base, stages = open_stages(list(settings.stages))
    checkpoints: list[Checkpoint | VirtualCheckpoint] = [base, *stages, Checkpoint(MERGED, "merged")]
    splits = {name: load_split(name, "eval") for name in settings.datasets}
    tokenizer, dtype = load_tokenizer(), compute_dtype()
    matrix: dict[str, dict[str, Cell]] = {}
    with tqdm(total=len(checkpoints) * len(splits), desc="evaluate", unit="cell", dynamic_ncols=True) as progress:
        for checkpoint in checkpoints:
            model = load_model(checkpoint, dtype)
            matrix[checkpoint.name] = {}
            for dataset, records in splits.items():
                matrix[checkpoint.name][dataset] = score(model, tokenizer, records, settings.evaluate)
                progress.update()
    skills = {name: stage.dataset for name, stage in settings.stages.items()}
    write_json(REPORTS / "evaluation.json", {"matrix": matrix, "retention": retention(matrix, skills)})


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: list[Record],
    bounds: params.Evaluate,
) -> Cell:
    """Loss on all records, and accuracy on those that hold a reference answer."""
    cell = {"loss": round(mean_loss(model, tokenizer, records, bounds.batch_size), 4)}
    asked = [record for record in records if answer(record) is not None]
    if asked:
        answers = generate(model, tokenizer, asked, bounds)
        right = sum(is_right(record, text) for record, text in zip(asked, answers, strict=True))
        cell["accuracy"] = round(right / len(asked), 4)
    return cell


@torch.inference_mode()
def mean_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: list[Record], batch_size: int
) -> float:
    """Cross-entropy in nats, averaged over all supervised tokens of `records`."""
    examples = [encode(record, tokenizer, model.config.max_position_embeddings) for record in records]
    examples.sort(key=lambda example: len(example.ids))
    losses = [
        supervised_losses(model, examples[start : start + batch_size], tokenizer.pad_token_id)
        for start in range(0, len(examples), batch_size)
    ]
    return float(torch.cat(losses).mean())


@torch.inference_mode()
def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: list[Record], bounds: params.Evaluate
) -> list[str]:
    """Greedy answers, each as long as the longest reference allows and at most `max_new_tokens`."""
    questions = [encode_question(record, tokenizer) for record in records]
    longest = max(len(tokenizer(answer(record))["input_ids"]) for record in records) + 1
    by_length = sorted(range(len(records)), key=lambda i: len(questions[i]))
    answers = [""] * len(records)
    for start in range(0, len(records), bounds.batch_size):
        rows = by_length[start : start + bounds.batch_size]
        batch = tokenizer.pad({"input_ids": [questions[i] for i in rows]}, padding_side="left", return_tensors="pt").to(
            model.device
        )
        output = model.generate(  # type: ignore[operator]
            **batch,
            max_new_tokens=min(longest, bounds.max_new_tokens),
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        new = output[:, batch["input_ids"].shape[1] :]
        for i, text in zip(rows, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            answers[i] = text.strip()
    return answers


def is_right(record: Record, text: str) -> bool:
    """Whether an answer is the reference, or gets full marks from the task's own scorer."""
    if text == str(answer(record)).strip():
        return True
    if "task" not in record:
        return False
    from reasoning_gym import get_score_answer_fn

    try:
        return bool(get_score_answer_fn(record["task"])(text, record["entry"]) >= 1.0)
    except Exception:  # some scorers raise on a malformed answer, which is then simply wrong
        return False


def retention(matrix: dict[str, dict[str, Cell]], skills: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What each stage gained on its own dataset over the base, and the share of it that the merged model keeps.

    Accuracy is the measure where both have it, else the fall of the loss. `retention` is None where the
    stage gained nothing.
    """
    result = {}
    for stage, dataset in skills.items():
        measure = "accuracy" if "accuracy" in matrix[stage][dataset] else "loss"
        start = matrix["base"][dataset][measure]
        gain = matrix[stage][dataset][measure] - start
        kept = matrix["merged"][dataset][measure] - start
        gained = gain > 0 if measure == "accuracy" else gain < 0
        result[stage] = {
            "dataset": dataset,
            "measure": measure,
            "gain": round(gain, 4),
            "merged_gain": round(kept, 4),
            "retention": round(kept / gain, 4) if gained else None,
        }
    return result


if __name__ == "__main__":
    run(main)
