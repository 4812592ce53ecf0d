"""The one shape of a training example, whatever its source, and how it becomes tokens.

A record is one of
    {"text": str}                                   every token is learned
    {"prompt": str, "completion": str}              the completion is learned
    {"messages": [{"role": str, "content": str}]}   the assistant's turns are learned, in the chat template
    {"input_ids": [int], "loss_weights": [float]}   tokens as they are, and how much each is learned
and may carry {"task": str, "entry": {...}} for a task that scores its own answers (its tuples marked, see
`mark_tuples`), and {"part": str} in a mix.

A prompt with its completion has {"format": "chat" | "plain"} where its dataset says so, a chat where it says "chat".
Both may have {"tools": [{...}]} and {"chat_template_kwargs": {...}} for the template, and so is what a message holds
beside role and content, such as `tool_calls`; a call without a text has the content "".

A text, a completion and each message may have a `weight` in the loss Σwᵢlᵢ/Σ|wᵢ|, and `spans`, a list of
[start, end, weight] over its characters, of which later ones win; a prompt has its `prompt_weight`. What follows a
text or a message, its end-of-text token or the end of its turn, has its weight. Below zero a token is unlearned.
"""

import json
import sys
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

from stages.errors import MistakeError

Record = dict[str, Any]
Span = tuple[int, int, float]
TUPLE = "__tuple__"
THINK, THOUGHT = "<think>", "</think>"
SHAPES = {  # by the key that tells it: the keys that tell a record's weights
    "text": ["weight", "spans"],
    "prompt": ["prompt_weight", "weight", "spans"],
    "messages": [],
    "input_ids": ["loss_weights"],
}


def check(record: Record, where: str) -> Record:
    """Return `record`, which is of one of the four shapes, if all that it holds is what it should be.

    Raises:
        MistakeError: it is not, in a sentence that starts with `where`; or there is more in it than text, numbers,
            dates, and lists and mappings of them.
    """
    _check_values(record, where)
    _check_keys(record, next(shape for shape in SHAPES if shape in record), where)
    if "messages" in record:
        _check_messages(record["messages"], where)
    elif "input_ids" in record:
        _check_ids(record, where)
    else:
        _check_texts(record, where)
    return record


def question(record: Record) -> str:
    """What tells two records apart, but for spaces at its ends: train and eval splits never share one."""
    if "messages" in record:
        return "\n".join(_said(message).strip() for message in record["messages"][:-1])
    if "input_ids" in record:
        return " ".join(map(str, record["input_ids"]))
    return (record["prompt"] if "prompt" in record else record["text"]).strip()


def questions(record: Record) -> list[str]:
    """The same of every answer in a chat, each of which may be learned, the last one last; else one."""
    messages = record.get("messages", [])
    earlier = [place for place, message in enumerate(messages[:-1]) if place and message["role"] == "assistant"]
    return [*(question({"messages": messages[: place + 1]}) for place in earlier), question(record)]


def asked(record: Record) -> str:
    """The question for people to read: of a chat of several messages, who says what, without thoughts."""
    messages = record.get("messages", [])[:-1]
    if len(messages) < 2:
        return question(record)
    return "\n".join(f"{message['role']}: {without_thinking(_said(message))}" for message in messages)


def answer(record: Record) -> str | None:
    """The reference answer that a generation is compared with.

    None for plain text, token ids, calls of a tool, and thoughts that come to no answer.
    """
    if "messages" in record:
        last = record["messages"][-1]
        said = None if last.get("tool_calls") else last["content"]
    else:
        said = record.get("completion")
    return said if said is None or without_thinking(said) else None


def without_thinking(text: str) -> str:
    """An answer without the thinking before it, be it told in the answer or begun by the chat template."""
    _, end, rest = text.partition(THOUGHT)
    if end:
        return rest.strip()
    return "" if text.lstrip().startswith(THINK) else text.strip()  # it never came to an answer


def is_empty(record: Record) -> bool:
    """Whether a text, prompt, completion, or turn of a user or assistant says nothing, or there is no turn."""
    if "messages" in record:
        turns = [message for message in record["messages"] if message["role"] in ("user", "assistant")]
        return not record["messages"] or not all(_said(message).strip() for message in turns)
    return any(not record[key].strip() for key in ("text", "prompt", "completion") if key in record)


def _said(message: Record) -> str:
    """The text of a message, and the tools that it calls."""
    calls = message.get("tool_calls")
    return message["content"] + (json.dumps(calls, default=str) if calls else "")


def mark_tuples(value: Any) -> Any:
    """A task's entry with each tuple as {TUPLE: [...]}, which JSON keeps; for scorers that compare tuples."""
    if isinstance(value, dict):
        return {key: mark_tuples(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [mark_tuples(item) for item in value]
        return {TUPLE: items} if isinstance(value, tuple) else items
    return value


def restore_tuples(value: Any) -> Any:
    """The entry that `mark_tuples` was given; one without marks is returned as it is."""
    if isinstance(value, list):
        return [restore_tuples(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {TUPLE}:
        return tuple(restore_tuples(value[TUPLE]))
    return {key: restore_tuples(item) for key, item in value.items()}


def _check_values(record: Record, where: str) -> None:
    """Refuse what a file of JSON does not hold, or not twice in the same way, such as an image."""
    for key, value in record.items():
        try:
            json.dumps([key, value], ensure_ascii=False, default=_as_text).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise MistakeError(f"{where} has half a character, {half!a}, in {key!a}; write the whole or none") from None
        except TypeError as error:
            raise MistakeError(
                f"{where} has {error} in {key!r}; remove that column, or name with columns those that are learned"
            ) from None


def _as_text(value: object) -> str:
    if isinstance(value, date | time | timedelta | Decimal):
        return str(value)
    raise TypeError(f"a value of type {type(value).__name__}")


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
        raise MistakeError(f"{where} needs an assistant message as its last one; leave out what comes after it")


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
    return value is None or (type(value) in (int, float) and abs(value) <= sys.float_info.max)  # type: ignore[arg-type]


def _is_span(span: object, length: int) -> bool:
    if not isinstance(span, list) or len(span) != 3 or None in span or not all(map(_is_weight, span)):
        return False
    start, end, _ = span  # whole, but maybe floats: a parquet column has one type
    return start == int(start) and end == int(end) and 0 <= start < end <= length
