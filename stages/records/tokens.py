"""How a record becomes tokens, and how much each is learned."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stages.errors import MistakeError
from stages.records.record import Record, Span, answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "\ufffc"  # stands in for a message, to see where a chat template puts it


@dataclass(frozen=True)
class Example:
    """Token ids of one record, and for each how much it counts in the loss (0: not learned), of the same length."""

    ids: list[int]
    weights: list[float]

    @property
    def learned(self) -> float:
        """Σ|weight| of the tokens that are predicted: all but the first."""
        return sum(map(abs, self.weights[1:]))


def encode(record: Record, tokenizer: "PreTrainedTokenizerBase", max_length: int | None) -> Example:
    """Turn a record into at most `max_length` tokens (None: all); what is learned ends with the end-of-text token.

    Raises:
        MistakeError: messages for a tokenizer whose chat template is missing, rewrites earlier turns, or changes a
            message that has weights of its own; token ids that the tokenizer does not have.
    """
    if "input_ids" in record:
        _check_vocabulary(record, tokenizer)
        ids, weights = record["input_ids"], list(map(float, record["loss_weights"]))
        return Example(ids[:max_length], weights[:max_length])
    ids = _start(record, tokenizer)
    weights = [0.0] * len(ids)
    for piece in _pieces(record, tokenizer):
        tokens, counted = _tokens(piece, tokenizer)
        ids += tokens
        weights += counted
    if "messages" not in record:
        ids.append(tokenizer.eos_token_id)
        weights.append(piece.weight)
    return Example(ids[:max_length], weights[:max_length])


def encode_question(record: Record, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Token ids of all that comes before the reference answer, if there is one: what a generation starts from."""
    if answer(record) is None:
        return []
    if "messages" in record:
        text = _render(record["messages"][:-1], tokenizer, ask=True)
    else:
        text = record["prompt"]
    return _start(record, tokenizer) + tokenizer(text, add_special_tokens=False)["input_ids"]


def _start(record: Record, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The beginning-of-text token, where the tokenizer puts one before a text and no chat template does it instead."""
    first = [] if "messages" in record else tokenizer("")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def _check_vocabulary(record: Record, tokenizer: "PreTrainedTokenizerBase") -> None:
    if (highest := max(record["input_ids"])) >= len(tokenizer):
        raise MistakeError(
            f"a record has input_ids up to {highest}, but base.model of params.yaml has {len(tokenizer)} tokens;"
            " make them with its tokenizer"
        )


@dataclass(frozen=True)
class _Piece:
    """Text that becomes tokens on its own, so that its ends are token boundaries, and its weights."""

    text: str
    weight: float
    spans: list[Span] = field(default_factory=list)


def _pieces(record: Record, tokenizer: "PreTrainedTokenizerBase") -> Iterator[_Piece]:
    if "messages" in record:
        yield from _turns(record["messages"], tokenizer)
        return
    if "prompt" in record:
        yield _Piece(record["prompt"], _weight(record, "prompt_weight", 0.0))
    text = record["completion"] if "prompt" in record else record["text"]
    yield _Piece(text, _weight(record, "weight", 1.0), _spans(record))


def _turns(messages: list[Record], tokenizer: "PreTrainedTokenizerBase") -> Iterator[_Piece]:
    done = ""
    for position, message in enumerate(messages):
        if message["role"] == "assistant":
            asked = _render(messages[:position], tokenizer, ask=True)
            yield _Piece(_rest(asked, done), 0.0)
            done = asked
        shown = _render(messages[: position + 1], tokenizer)
        yield _turn(messages[: position + 1], _rest(shown, done), done, tokenizer)
        done = shown


def _turn(messages: list[Record], text: str, done: str, tokenizer: "PreTrainedTokenizerBase") -> _Piece:
    """The last of `messages`, which the template shows as `text`: its weight is that of its content and its end."""
    answers = messages[-1]["role"] == "assistant"  # what comes before its content is then the template's doing
    weight, spans = _weight(messages[-1], "weight", float(answers)), _spans(messages[-1])
    if not spans and (answers or not weight):
        return _Piece(text, weight)
    first = _find_content(messages, text, done, tokenizer)
    moved = [(first + start, first + end, other) for start, end, other in spans]
    return _Piece(text, weight if answers else 0.0, [(first, len(text), weight), *moved])


def _find_content(messages: list[Record], text: str, done: str, tokenizer: "PreTrainedTokenizerBase") -> int:
    """Where the last message's content starts in `text`; searching for it might find the role of the same name."""
    marked = _render([*messages[:-1], messages[-1] | {"content": MARK}], tokenizer)
    start = _rest(marked, done).find(MARK)
    if start < 0 or not text.startswith(messages[-1]["content"], start):
        raise MistakeError(
            "params.yaml: base.model has a chat template that changes a message with a weight or spans of its own;"
            " remove spaces at its ends, or use records with prompt and completion"
        )
    return start


def _tokens(piece: _Piece, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[float]]:
    """Token ids and weights; a token has the weight of its first character that is no space."""
    if not piece.spans:
        ids = tokenizer(piece.text, add_special_tokens=False)["input_ids"]
        return ids, [piece.weight] * len(ids)
    weights = [piece.weight] * (len(piece.text) + 1)  # one more, for a token of no characters at the end
    for start, end, weight in piece.spans:
        weights[start:end] = [weight] * (end - start)
    try:
        found = tokenizer(piece.text, add_special_tokens=False, return_offsets_mapping=True)
    except NotImplementedError:
        raise MistakeError(
            "params.yaml: base.model has a tokenizer that does not tell which characters a token stands for; use"
            " records with input_ids in place of spans"
        ) from None
    return found["input_ids"], [weights[_first(piece.text, *offsets)] for offsets in found["offset_mapping"]]


def _first(text: str, start: int, end: int) -> int:
    """The first character of text[start:end] that is no space: a token often starts with the space before a word."""
    words = text[start:end].lstrip()
    return end - len(words) if words else start


def _weight(owner: Record, key: str, default: float) -> float:
    value = owner.get(key)
    return default if value is None else float(value)


def _spans(owner: Record) -> list[Span]:
    return [(int(start), int(end), float(weight)) for start, end, weight in owner.get("spans") or []]


def _render(messages: list[Record], tokenizer: "PreTrainedTokenizerBase", ask: bool = False) -> str:
    if not tokenizer.chat_template:
        raise MistakeError(
            "params.yaml: base.model has no chat template for records with messages;"
            " use a chat model, or records with prompt and completion"
        )
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))


def _rest(text: str, start: str) -> str:
    """The part of `text` after `start`: rendering by prefix difference needs no change of the template."""
    if not text.startswith(start):
        raise MistakeError(
            "params.yaml: base.model has a chat template that rewrites earlier turns as the chat goes on;"
            " split such chats into records with one answer each"
        )
    return text[len(start) :]
