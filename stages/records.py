"""The one shape of a training example, whatever its source, and how it becomes tokens.

A record is one of
    {"text": str}                                   every token is learned
    {"prompt": str, "completion": str}              the completion is learned; it follows the prompt as it is
    {"messages": [{"role": str, "content": str}]}   the assistant's turns are learned, in the chat template
and may carry {"task": str, "entry": {...}} for a task that scores its own answers.
"""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.errors import MistakeError
from stages.files import DATA

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Record = dict[str, Any]


def check(record: object, where: str) -> Record:
    """Return `record` if it has one of the three shapes, else raise a MistakeError that starts with `where`."""
    if not isinstance(record, dict):
        raise MistakeError(f"{where} is no mapping of keys; write one record per line")
    shapes = [keys for keys in (("text",), ("prompt", "completion"), ("messages",)) if keys[0] in record]
    if len(shapes) != 1:
        raise MistakeError(f"{where} needs exactly one of text, prompt with completion, or messages")
    for key in shapes[0]:
        if key == "messages":
            _check_messages(record[key], where)
        elif not isinstance(record.get(key), str) or (key != "prompt" and not record[key].strip()):
            raise MistakeError(f"{where} needs {key} as text that is not empty")
    return record


def question(record: Record) -> str:
    """What tells two records apart: train and eval splits never share one."""
    if "messages" in record:
        return "\n".join(message["content"] for message in record["messages"][:-1])
    return record["prompt"] if "prompt" in record else record["text"]


def answer(record: Record) -> str | None:
    """The reference answer that a generation is compared with; None for plain text."""
    if "messages" in record:
        return record["messages"][-1]["content"]
    return record.get("completion")


def load_split(name: str, part: str) -> list[Record]:
    """Records of one split (`train`, `eval` or `tune`) of dataset `name`, as the data stage left them."""
    with (DATA / name / f"{part}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


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
        MistakeError: messages for a tokenizer whose chat template is missing or rewrites earlier turns.
    """
    ids: list[int] = []
    weights: list[float] = []
    for text, learned in _segments(record, tokenizer):
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += tokens
        weights += [float(learned)] * len(tokens)
    if "messages" not in record:
        ids.append(tokenizer.eos_token_id)
        weights.append(1.0)
    return Example(ids[:max_length], weights[:max_length])


def encode_question(record: Record, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Token ids of all that comes before the reference answer: what a generation starts from."""
    if "messages" in record:
        text = _render(record["messages"][:-1], tokenizer, ask=True)
    else:
        text = record["prompt"]
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _check_messages(messages: object, where: str) -> None:
    if not isinstance(messages, list) or len(messages) < 2:
        raise MistakeError(f"{where} needs messages as a list of at least two turns")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise MistakeError(f"{where} needs role and content as text in every message")
    if messages[-1]["role"] != "assistant":
        raise MistakeError(f"{where} needs an assistant message as its last one")


def _segments(record: Record, tokenizer: "PreTrainedTokenizerBase") -> list[tuple[str, bool]]:
    if "text" in record:
        return [(record["text"], True)]
    if "prompt" in record:
        return [(record["prompt"], False), (record["completion"], True)]
    segments = []
    done = ""
    for position, message in enumerate(record["messages"]):
        if message["role"] == "assistant":
            asked = _render(record["messages"][:position], tokenizer, ask=True)
            segments.append((_rest(asked, done), False))
            done = asked
        shown = _render(record["messages"][: position + 1], tokenizer)
        segments.append((_rest(shown, done), message["role"] == "assistant"))
        done = shown
    return segments


def _render(messages: list[dict[str, str]], tokenizer: "PreTrainedTokenizerBase", ask: bool = False) -> str:
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
