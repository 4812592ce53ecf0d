"""What a running model can do: its loss on records, and its answers."""

import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from stages.models.architecture import text_config
from stages.models.losses import record_losses
from stages.records.record import Record, answer, asked
from stages.records.scorers import score_answers
from stages.records.tokens import turns
from stages.settings.evaluate import Evaluate

STOP, CUT, UNASKED = "stop", "cut", "unasked"


class Answer(NamedTuple):
    """What a model says, and how that ended.

    STOP: by itself; CUT: by `max_new_tokens`, or where the model can read no further; UNASKED: the question is longer
    than the model reads.
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
        {"question": asked(record), "reference": answer(record), "loss": loss, "weight": weight}
        for record, (loss, weight) in zip(records, found, strict=True)
    ]
    scored = [i for i, row in enumerate(rows) if row["reference"] is not None and scorers[i] != "loss"]
    if scored:
        names, questions = [scorers[i] for i in scored], [records[i] for i in scored]
        answers = generate(model, tokenizer, questions, bounds)
        scores = score_answers(names, [each.text for each in answers], questions)
        for i, name, said, value in zip(scored, names, answers, scores, strict=True):
            rows[i] |= {"answer": said.text, "end": said.end, "scorer": name, "score": value}
    return rows


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    bounds: Evaluate,
    streamer: TextStreamer | None = None,
) -> list[Answer]:
    """Greedy answers of at most `max_new_tokens`.

    Of the base's generation config the tokens that end an answer have a say and nothing else has: a penalty for
    repetition in it would change every answer. `streamer` gets the tokens of a single one as they come.
    """
    turned = [turns(record, tokenizer)[-1] for record in records]
    stops, most = _stops(model, tokenizer), bounds.max_new_tokens
    positions = getattr(text_config(model), "max_position_embeddings", None) or sys.maxsize
    answers = [Answer("", UNASKED)] * len(records)
    with _without_config(model):
        for rows in _batches([len(turn.asked.ids) for turn in turned], bounds.batch_size, most, positions):
            questions = {"input_ids": [turned[i].asked.ids for i in rows]}
            batch = tokenizer.pad(questions, padding_side="left", return_tensors="pt").to(model.device)
            width = batch["input_ids"].shape[1]
            greedy = GenerationConfig(
                max_new_tokens=min(most, positions - width),
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=stops,
            )
            output = model.generate(**batch, generation_config=greedy, streamer=streamer)  # type: ignore[operator]
            for i, ids in zip(rows, output[:, width:].tolist(), strict=True):
                spoken = list(itertools.takewhile(lambda token: token not in stops, ids))
                text = str(tokenizer.decode(_after(turned[i].lead, spoken), skip_special_tokens=True)).strip()
                answers[i] = Answer(text, STOP if len(spoken) < len(ids) else CUT)
    return answers


def _batches(lengths: list[int], size: int, most: int, positions: int) -> list[list[int]]:
    """Places of questions that are asked together, the shortest first.

    One that leaves no room for `most` tokens is asked alone, and one that the model cannot read to its end not at all.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    roomy = [i for i in order if lengths[i] + most <= positions]
    tight = [i for i in order[len(roomy) :] if lengths[i] < positions]
    return [roomy[start : start + size] for start in range(0, len(roomy), size)] + [[i] for i in tight]


def _after(lead: list[int], spoken: list[int]) -> list[int]:
    """What is said after the last `lead`, such as the name of a channel; all of it where there is none."""
    starts = [start for start in range(len(spoken)) if lead and spoken[start : start + len(lead)] == lead]
    return spoken[starts[-1] + len(lead) :] if starts else spoken


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
