"""What a running model can do: its loss on records, and its answers."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from stages.models.losses import record_losses
from stages.records.record import Record, answer, question
from stages.records.scorers import score_answers
from stages.records.tokens import encode_question
from stages.settings.evaluate import Evaluate


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    scorers: Sequence[str],
    bounds: Evaluate,
) -> list[dict[str, Any]]:
    """Ask every record, and score what the model says.

    Args:
        model: that is asked.
        tokenizer: of the base.
        records: with a reference answer or without.
        scorers: the name of each record's; where it is `loss`, or there is no reference, nothing is asked.
        bounds: of the answers.

    Returns:
        For each record `question`, `reference`, `loss` (Σwᵢlᵢ over its tokens, in nats) and `weight` (Σ|wᵢ|), and where
        it was asked `answer`, `scorer` and `score` (0 to 1).
    """
    found = record_losses(model, tokenizer, records, bounds.batch_size)
    rows: list[dict[str, Any]] = [
        {"question": question(record), "reference": answer(record), "loss": loss, "weight": weight}
        for record, (loss, weight) in zip(records, found, strict=True)
    ]
    asked = [i for i, row in enumerate(rows) if row["reference"] is not None and scorers[i] != "loss"]
    if asked:
        names, questions = [scorers[i] for i in asked], [records[i] for i in asked]
        answers = generate(model, tokenizer, questions, bounds)
        scores = score_answers(names, answers, questions)
        for i, name, text, value in zip(asked, names, answers, scores, strict=True):
            rows[i] |= {"answer": text, "scorer": name, "score": value}
    return rows


@torch.inference_mode()
def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], bounds: Evaluate
) -> list[str]:
    """Greedy answers, each as long as the longest reference allows and at most `max_new_tokens`.

    The base's own generation config has no say: a penalty for repetition in it would change every answer.
    """
    questions = [encode_question(record, tokenizer) for record in records]
    longest = max(len(tokenizer(answer(record))["input_ids"]) for record in records) + 1
    greedy = GenerationConfig(
        max_new_tokens=min(longest, bounds.max_new_tokens),
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.generation_config = GenerationConfig()  # what `greedy` leaves open would be taken from it
    by_length = sorted(range(len(records)), key=lambda i: len(questions[i]))
    answers = [""] * len(records)
    for start in range(0, len(records), bounds.batch_size):
        rows = by_length[start : start + bounds.batch_size]
        batch = tokenizer.pad({"input_ids": [questions[i] for i in rows]}, padding_side="left", return_tensors="pt").to(
            model.device
        )
        output = model.generate(**batch, generation_config=greedy)  # type: ignore[operator]
        new = output[:, batch["input_ids"].shape[1] :]
        for i, text in zip(rows, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            answers[i] = text.strip()
    return answers
