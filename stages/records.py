"""The one shape of a training example, whatever its source, and how it becomes tokens.

A record is one of
    {"text": str}                                   every token is learned
    {"prompt": str, "completion": str}              the completion is learned; it follows the prompt as it is
    {"messages": [{"role": str, "content": str}]}   the assistant's turns are learned, in the chat template
    {"input_ids": [int], "loss_weights": [float]}   tokens as they are, and how much each is learned
and may carry {"task": str, "entry": {...}} for a task that scores its own answers, and {"part": str} in a mix.

A text, a completion and each message may have a `weight` in the loss Σwᵢlᵢ/Σ|wᵢ|, and `spans`, a list of
[start, end, weight] over its characters, of which later ones win; a prompt has its `prompt_weight`. What follows a
text or a message, its end-of-text token or the end of its turn, has its weight. Below zero a token is unlearned.
"""

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.errors import MistakeError
from stages.files import DATA

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Record = dict[str, Any]
Span = tuple[int, int, float]

SHAPES = {  # by the key that tells it: the keys that tell a record's weights
    "text": ["weight", "spans"],
    "prompt": ["prompt_weight", "weight", "spans"],
    "messages": [],
    "input_ids": ["loss_weights"],
}
MARK = "\ufffc"  # stands in for a message, to see where a chat template puts it


def check(record: object, where: str) -> Record:
    """Return `record` if it has one of the four shapes, else raise a MistakeError that starts with `where`."""
    if not isinstance(record, dict):
        raise MistakeError(f"{where} is no mapping of keys; write one record per line")
    shapes = [shape for shape in SHAPES if shape in record]
    if len(shapes) != 1:
        raise MistakeError(
            f"{where} needs exactly one of text, prompt with completion, messages, or input_ids with loss_weights"
        )
    _check_keys(record, shapes[0], where)
    if "messages" in record:
        _check_messages(record["messages"], where)
    elif "input_ids" in record:
        _check_ids(record, where)
    else:
        _check_texts(record, where)
    return record


def question(record: Record) -> str:
    """What tells two records apart: train and eval splits never share one."""
    if "messages" in record:
        return "\n".join(message["content"] for message in record["messages"][:-1])
    if "input_ids" in record:
        return " ".join(map(str, record["input_ids"]))
    return record["prompt"] if "prompt" in record else record["text"]


def answer(record: Record) -> str | None:
    """The reference answer that a generation is compared with; None for plain text and for token ids."""
    if "messages" in record:
        return record["messages"][-1]["content"]
    return record.get("completion")


class Lines(Sequence[Record]):
    """Records of a jsonl file, parsed when they are asked for: memory holds where each line starts, and no more."""

    def __init__(self, path: Path) -> None:
        self._path, self._starts, self._numbers = path, array("Q"), array("Q")
        start = 0
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    self._starts.append(start)
                    self._numbers.append(number)
                start += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(len(self))[place]]
        with self._path.open("rb") as lines:
            lines.seek(self._starts[place])
            line = lines.readline()
        try:
            return json.loads(line)
        except ValueError as error:  # of JSON, or of UTF-8
            reason = getattr(error, "msg", error)
            raise MistakeError(f"{self.where(place)} is not valid JSON ({reason}); correct that line") from None

    def where(self, place: int) -> str:
        """The file and line of one record."""
        return f"{self._path} line {self._numbers[place]}"


def load_split(name: str, part: str) -> Sequence[Record]:
    """Records of one split (`train`, `eval` or `tune`) of dataset `name`, as the data stage left them."""
    return Lines(DATA / name / f"{part}.jsonl")


@dataclass(frozen=True)
class Example:
    """Token ids of one record, and for each how much it counts in the loss (0: not learned), of the same length."""

    ids: list[int]
    weights: list[float]

    @property
    def learned(self) -> float:
        """Σ|weight| of the tokens that are predicted: all but the first."""
        return sum(map(abs, self.weights[1:]))


def encode(record: Record, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> Example:
    """Turn a record into at most `max_length` tokens; what is learned ends with the end-of-text token.

    Raises:
        MistakeError: messages for a tokenizer whose chat template is missing, rewrites earlier turns, or changes a
            message that has weights of its own; token ids that the tokenizer does not have.
    """
    if "input_ids" in record:
        _check_vocabulary(record, tokenizer)
        ids, weights = record["input_ids"], list(map(float, record["loss_weights"]))
        return Example(ids[:max_length], weights[:max_length])
    ids, weights = [], []
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
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _check_keys(record: Record, shape: str, where: str) -> None:
    """Refuse weights that this shape does not know, for they would be passed over in silence."""
    for key in ("weight", "spans", "prompt_weight", "loss_weights"):
        if record.get(key) is not None and key not in SHAPES[shape]:
            known = " and ".join(SHAPES[shape]) or "weight and spans in each message"
            raise MistakeError(f"{where} has {key}, which does not go with {shape}; remove it or use {known}")


def _check_texts(record: Record, where: str) -> None:
    keys = ["text"] if "text" in record else ["prompt", "completion"]
    for key in keys:
        if not isinstance(record.get(key), str) or (key != "prompt" and not record[key].strip()):
            raise MistakeError(f"{where} needs {key} as text that is not empty")
    if not _is_weight(record.get("prompt_weight")):
        raise MistakeError(f"{where} has prompt_weight {record['prompt_weight']!r}; write a finite number")
    _check_weights(record, record[keys[-1]], where)


def _check_messages(messages: object, where: str) -> None:
    if not isinstance(messages, list) or len(messages) < 2:
        raise MistakeError(f"{where} needs messages as a list of at least two turns")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise MistakeError(f"{where} needs role and content as text in every message")
        _check_weights(message, message["content"], f"{where} message {number}")
    if messages[-1]["role"] != "assistant":
        raise MistakeError(f"{where} needs an assistant message as its last one")


def _check_ids(record: Record, where: str) -> None:
    ids, weights = record["input_ids"], record.get("loss_weights")
    if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise MistakeError(f"{where} needs input_ids as a list of token ids, which are numbers from 0")
    if not isinstance(weights, list) or len(weights) != len(ids) or not all(w is not None for w in weights):
        raise MistakeError(f"{where} needs loss_weights as a list with a number for each of its {len(ids)} input_ids")
    if wrong := [weight for weight in weights if not _is_weight(weight)]:
        raise MistakeError(f"{where} has {wrong[0]!r} in loss_weights; write a finite number")


def _check_weights(owner: Record, text: str, where: str) -> None:
    """Check the `weight` and `spans` of a text, where None is as good as nothing: tables know no missing keys."""
    if not _is_weight(owner.get("weight")):
        raise MistakeError(f"{where} has weight {owner['weight']!r}; write a finite number")
    spans = owner.get("spans")
    if spans is not None and not isinstance(spans, list):
        raise MistakeError(f"{where} has spans that are no list; write [[start, end, weight], …]")
    for span in spans or []:
        if not _is_span(span, len(text)):
            raise MistakeError(
                f"{where} has span {span!r}; write [start, end, weight] with characters 0 ≤ start < end ≤ {len(text)}"
                " and a finite weight"
            )


def _is_weight(value: object) -> bool:
    return value is None or (type(value) in (int, float) and isfinite(value))  # type: ignore[arg-type]


def _is_span(span: object, length: int) -> bool:
    if not isinstance(span, list) or len(span) != 3 or None in span or not all(map(_is_weight, span)):
        return False
    start, end, _ = span  # whole, but maybe floats: a parquet column has one type
    return start == int(start) and end == int(end) and 0 <= start < end <= length


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
