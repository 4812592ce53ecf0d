"""What a running model can do: its loss on records, and its answers."""

import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from stages.models.losses import pad, token_losses
from stages.records.record import Record, answer, restore_tuples
from stages.records.tokens import encode, turns
from stages.settings.evaluate import Evaluate

Cell = dict[str, float]  # loss in nats per supervised token; where there are answers to compare with, accuracy


def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], bounds: Evaluate
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
    positions = getattr(model.config, "max_position_embeddings", None)  # BLOOM, MPT and Mamba have no limit
    examples = [example for record in records for example in encode(record, tokenizer, positions)]
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
    """Greedy answers, each as long as the longest reference allows and at most `max_new_tokens`.

    Of the base's generation config the tokens that end an answer have a say and nothing else has: a penalty for
    repetition in it would change every answer.
    """
    asked = [turns(record, tokenizer)[-1] for record in records]
    stops = stop_tokens(model, tokenizer)
    most = min(max(len(turn.answered.ids) for turn in asked), bounds.max_new_tokens)
    positions = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    answers = [""] * len(records)
    with _without_config(model):
        for rows in _batches([len(turn.asked.ids) for turn in asked], bounds.batch_size, most, positions):
            questions = {"input_ids": [asked[i].asked.ids for i in rows]}
            batch = tokenizer.pad(questions, padding_side="left", return_tensors="pt").to(model.device)
            width = batch["input_ids"].shape[1]
            greedy = GenerationConfig(
                max_new_tokens=min(most, positions - width),
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=stops,
            )
            output = model.generate(**batch, generation_config=greedy)  # type: ignore[operator]
            for i, ids in zip(rows, output[:, width:].tolist(), strict=True):
                spoken = itertools.takewhile(lambda token: token not in stops, ids)
                answers[i] = tokenizer.decode(list(spoken), skip_special_tokens=True).strip()
    return answers


def _batches(lengths: list[int], size: int, most: int, positions: int) -> list[list[int]]:
    """Places of questions that are asked together, the shortest first.

    One that leaves no room for `most` tokens is asked alone, and one that the model cannot read to its end not at all.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    roomy = [i for i in order if lengths[i] + most <= positions]
    tight = [i for i in order[len(roomy) :] if lengths[i] < positions]
    return [roomy[start : start + size] for start in range(0, len(roomy), size)] + [[i] for i in tight]


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
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


def is_right(record: Record, text: str) -> bool:
    """Whether an answer gets full marks from the task's own scorer, or is the reference where there is none."""
    if "task" not in record:
        return text == str(answer(record)).strip()
    from reasoning_gym import get_score_answer_fn

    try:
        return bool(get_score_answer_fn(record["task"])(text, restore_tuples(record["entry"])) >= 1.0)
    except Exception:  # some scorers raise on a malformed answer, which is then simply wrong
        return False
