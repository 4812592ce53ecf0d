"""What a running model can do: its loss on records, and its answers."""

import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from stages.models.losses import record_losses
from stages.records.record import Record, answer, question
from stages.records.scorers import score_answers
from stages.records.tokens import turns
from stages.settings.evaluate import Evaluate

STOP, CUT, UNASKED = "stop", "cut", "unasked"


class Answer(NamedTuple):
    """What a model says, and how that ended.

    STOP: by itself, or where it was already longer than any reference and nothing else counts; CUT: by
    `max_new_tokens`, or where the model can read no further; UNASKED: the question is longer than the model reads.
    """

    text: str
    end: str


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
        it was asked `answer`, its `end` (see `Answer`), `scorer` and `score` (0 to 1).
    """
    found = record_losses(model, tokenizer, records, bounds.batch_size)
    rows: list[dict[str, Any]] = [
        {"question": question(record), "reference": answer(record), "loss": loss, "weight": weight}
        for record, (loss, weight) in zip(records, found, strict=True)
    ]
    asked = [i for i, row in enumerate(rows) if row["reference"] is not None and scorers[i] != "loss"]
    if asked:
        names, questions = [scorers[i] for i in asked], [records[i] for i in asked]
        answers = generate(model, tokenizer, questions, bounds, whole=set(names) != {"exact"})
        scores = score_answers(names, [each.text for each in answers], questions)
        for i, name, said, value in zip(asked, names, answers, scores, strict=True):
            rows[i] |= {"answer": said.text, "end": said.end, "scorer": name, "score": value}
    return rows


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    bounds: Evaluate,
    whole: bool = False,
) -> list[Answer]:
    """Greedy answers of at most `max_new_tokens`, and no longer than the longest reference unless they are to be whole.

    One that is longer is not the reference, so that `exact` needs no more of it; other scorers look for something in
    an answer, and count what there is too much.

    Of the base's generation config the tokens that end an answer have a say and nothing else has: a penalty for
    repetition in it would change every answer.
    """
    asked = [turns(record, tokenizer)[-1] for record in records]
    stops = _stops(model, tokenizer)
    longest = max(len(turn.answered.ids) for turn in asked)
    most = bounds.max_new_tokens if whole else min(longest, bounds.max_new_tokens)
    positions = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    answers = [Answer("", UNASKED)] * len(records)
    with _without_config(model):
        for rows in _batches([len(turn.asked.ids) for turn in asked], bounds.batch_size, most, positions):
            questions = {"input_ids": [asked[i].asked.ids for i in rows]}
            batch = tokenizer.pad(questions, padding_side="left", return_tensors="pt").to(model.device)
            width = batch["input_ids"].shape[1]
            room = min(most, positions - width)
            end = CUT if room < most or most == bounds.max_new_tokens else STOP
            greedy = GenerationConfig(
                max_new_tokens=room,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=stops,
            )
            output = model.generate(**batch, generation_config=greedy)  # type: ignore[operator]
            for i, ids in zip(rows, output[:, width:].tolist(), strict=True):
                spoken = list(itertools.takewhile(lambda token: token not in stops, ids))
                text = str(tokenizer.decode(spoken, skip_special_tokens=True)).strip()
                answers[i] = Answer(text, STOP if len(spoken) < len(ids) else end)
    return answers


def _batches(lengths: list[int], size: int, most: int, positions: int) -> list[list[int]]:
    """Places of questions that are asked together, the shortest first.

    One that leaves no room for `most` tokens is asked alone, and one that the model cannot read to its end not at all.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    roomy = [i for i in order if lengths[i] + most <= positions]
    tight = [i for i in order[len(roomy) :] if lengths[i] < positions]
    return [roomy[start : start + size] for start in range(0, len(roomy), size)] + [[i] for i in tight]


def _stops(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends an answer: the tokens of the generation config, else the tokenizer's."""
    config = model.generation_config
    ends = config.eos_token_id if config and config.eos_token_id is not None else tokenizer.eos_token_id
    return ends if isinstance(ends, list) else [ends]


@contextmanager
def _without_config(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the model has no generation config of its own, which fills what another leaves open."""
    config, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = config
