"""How a record becomes tokens, and how much each is learned: the tokens that the model sees when it is used."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from stages.errors import MistakeError
from stages.records.record import Record, answer
from stages.records.template import Text, as_chat, spans_of, weight_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BETWEEN = ("\n", ".", "a", "1")  # what may stand before a text that is not the first, so that no space is put there


@dataclass(frozen=True)
class Example:
    """Token ids, and for each how much it counts in the loss (0: not learned), of the same length."""

    ids: list[int]
    weights: list[float]

    @property
    def learned(self) -> float:
        """Σ|weight| of the tokens that are predicted: all but the first."""
        return sum(map(abs, self.weights[1:]))


@dataclass(frozen=True)
class Turn:
    """What a model is asked, token by token as it will be, and what it should answer.

    Attributes:
        lead: tokens of the answer that the chat template puts before what was said, such as the name of a channel.
    """

    asked: Example
    answered: Example
    lead: list[int] = field(default_factory=list)


def encode(record: Record, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> list[Example]:
    """The examples of a record, each of at most `max_length` tokens (None: all).

    It is one, unless the chat template shows earlier turns otherwise once a chat goes on: then each answer that counts
    is in one of its own.

    Raises:
        MistakeError: the record does not go with the base's chat template or its tokenizer.
    """
    examples: list[Example] = []
    for turn in turns(record, tokenizer):
        before = examples[-1] if examples else Example([], [])
        if turn.asked.ids[: len(before.ids)] == before.ids:
            examples = examples[:-1]
        else:
            before = Example([], [])
        weights = [*before.weights, *turn.asked.weights[len(before.ids) :], *turn.answered.weights]
        examples.append(Example(turn.asked.ids + turn.answered.ids, weights))
    return [Example(example.ids[:max_length], example.weights[:max_length]) for example in examples]


def encode_question(record: Record, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of all that comes before the reference answer, if there is one: what a generation starts from."""
    return [] if answer(record) is None else turns(record, tokenizer)[-1].asked.ids


def turns(record: Record, tokenizer: PreTrainedTokenizerBase) -> list[Turn]:
    """Every answer of a record that counts, and the last; a text and token ids answer nothing.

    Raises:
        MistakeError: as `encode`.
    """
    found = _turns(record, tokenizer)
    rows = getattr(tokenizer, "rows", None) or len(tokenizer)
    highest = max((max(each.ids, default=0) for turn in found for each in (turn.asked, turn.answered)), default=0)
    if highest < rows:
        return found
    if "input_ids" in record:
        raise MistakeError(
            f"a record has input_ids up to {highest}, but base.model of params.yaml has {rows} tokens; make them with"
            " its tokenizer"
        )
    raise MistakeError(
        f"a record has the token {tokenizer.convert_ids_to_tokens(highest)!r}, which is number {highest}, but"
        f" base.model of params.yaml has an embedding of {rows} rows; resize the embedding to its tokenizer"
    )


def _turns(record: Record, tokenizer: PreTrainedTokenizerBase) -> list[Turn]:
    if "input_ids" in record:
        return [Turn(Example([], []), Example(record["input_ids"], list(map(float, record["loss_weights"]))))]
    if chat := as_chat(record, tokenizer):
        found = [_turn(*pair, [], tokenizer, end=chat.end[0] is None) for pair in chat.answers()]
        return [replace(turn, lead=_ids(chat.lead, tokenizer)) for turn in found] if chat.lead else found
    asked = record.get("prompt", "")
    if "task" in record:  # the answer to a generated question is on a line of its own
        asked = f"{asked.rstrip()}\n"
    prompt = Text(asked, weight_of(record, "prompt_weight", 0.0))
    text = record["completion"] if "prompt" in record else record["text"]
    learned = Text(text, weight_of(record, "weight", 1.0), spans_of(record))
    first = tokenizer("")["input_ids"][:1]  # the beginning-of-text token, where the tokenizer puts one before a text
    if first != [tokenizer.bos_token_id]:
        first = []
    if prompt.text == "" and "prompt" in record and not first:  # a generation must start from something
        first = [end_of_text(tokenizer) if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    return [_turn(prompt, learned, first, tokenizer, end=True)]


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a text.

    Raises:
        MistakeError: there is none.
    """
    if tokenizer.eos_token_id is None:
        raise MistakeError(
            "a record has an end that base.model of params.yaml has no token for; give its tokenizer an eos_token, in"
            " tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def _turn(prompt: Text, learned: Text, first: list[int], tokenizer: PreTrainedTokenizerBase, end: bool) -> Turn:
    """A prompt and what follows it, with the end-of-text token where no other ends the answer."""
    asked, weights = _tokens(prompt, tokenizer)
    answered = Example(*_tokens(learned, tokenizer, before=prompt.text))
    if end:
        answered = Example([*answered.ids, end_of_text(tokenizer)], [*answered.weights, learned.weight])
    return Turn(Example(first + asked, [0.0] * len(first) + weights), answered)


def _tokens(piece: Text, tokenizer: PreTrainedTokenizerBase, before: str = "") -> tuple[list[int], list[float]]:
    """Token ids and weights of a text that follows `before`; a token has the weight of its first character.

    Spaces at its beginning do not count: a token often starts with the space before a word.
    """
    lead, skipped, ids = _after(before, piece.text, tokenizer)
    if not piece.spans:
        return ids, [piece.weight] * len(ids)
    weights = [piece.weight] * (len(piece.text) + 1)  # one more, for a token of no characters at the end
    for start, end, weight in piece.spans:
        weights[start:end] = [weight] * (end - start)
    starts = [_first(lead + piece.text, *ends) for ends in _offsets(lead + piece.text, tokenizer)[skipped:]]
    return ids, [weights[max(start - len(lead), 0)] for start in starts]


def _after(before: str, text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, int, list[int]]:
    """The tokens of a text as they follow `before`, and what was put before it to find them, with its token count.

    Tokenizers like SentencePiece put a space before the first text, and a tokenizer may make one token of the end of
    `before` and the beginning of `text`, which a model cannot when it goes on from all tokens of `before`.
    """
    for lead in (before, *BETWEEN) if before else ():
        start, whole = _ids(lead, tokenizer), _ids(lead + text, tokenizer)
        if whole[: len(start)] == start:
            return lead, len(start), whole[len(start) :]
    return "", 0, _ids(text, tokenizer)


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _offsets(text: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    """Where each token of the text begins and ends, in characters."""
    try:
        return list(tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"])
    except NotImplementedError:
        raise MistakeError(
            "a record has weights of some characters, and base.model of params.yaml has a tokenizer that does not tell"
            " which characters a token stands for; use records with input_ids in place of spans"
        ) from None


def _first(text: str, start: int, end: int) -> int:
    """The first character of text[start:end] that is no space."""
    words = text[start:end].lstrip()
    return end - len(words) if words else start
