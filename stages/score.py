"""Base and stages on every skill: `python -m stages.score`.

Rows are the base and each stage with its effective weights, columns the eval splits. Each cell has the loss in nats
per supervised token and, where there is an answer to compare with, the share of answers that are right. Writes
reports/scores.json.
"""

from collections.abc import Sequence

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages.errors import run
from stages.files import REPORTS, write_json
from stages.models.loading import Weights, compute_dtype, device, load_model, load_tokenizer
from stages.models.losses import pad, token_losses
from stages.project.params import Params, load_params
from stages.records.lines import load_split
from stages.records.record import Record, answer
from stages.records.tokens import encode, encode_question
from stages.settings.evaluate import Evaluate
from stages.weights.checkpoint import open_stages

Cell = dict[str, float]
Matrix = dict[str, dict[str, Cell]]


def main() -> None:
    """Score the base and every stage."""
    settings = load_params()
    torch.set_num_threads(settings.thread_count)
    base, stages = open_stages(list(settings.stages))
    write_json(REPORTS / "scores.json", score_all([base, *stages], settings))


def score_all(checkpoints: list[Weights], settings: Params) -> Matrix:
    """Cells of every model on every eval split, by model and dataset."""
    splits = {name: load_split(name, "eval") for name in settings.datasets}
    tokenizer, dtype = load_tokenizer(), compute_dtype()
    matrix: Matrix = {}
    with tqdm(total=len(checkpoints) * len(splits), desc="score", unit="cell", dynamic_ncols=True) as progress:
        for checkpoint in checkpoints:
            model = load_model(checkpoint, dtype, device())
            matrix[checkpoint.name] = {}
            for dataset, records in splits.items():
                matrix[checkpoint.name][dataset] = score(model, tokenizer, records, settings.evaluate)
                progress.update()
    return matrix


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    bounds: Evaluate,
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
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], batch_size: int
) -> float:
    """Cross-entropy in nats, averaged over the supervised tokens of `records` by their weights."""
    examples = [encode(record, tokenizer, model.config.max_position_embeddings) for record in records]
    examples.sort(key=lambda example: len(example.ids))
    total = 0.0
    for start in range(0, len(examples), batch_size):
        batch = pad(examples[start : start + batch_size], tokenizer.pad_token_id, model.device)
        losses, weights = token_losses(model, batch)
        total += float((losses * weights).sum())
    return total / sum(example.learned for example in examples)


@torch.inference_mode()
def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], bounds: Evaluate
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


if __name__ == "__main__":
    run(main)
