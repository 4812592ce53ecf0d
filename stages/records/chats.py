"""Messages of a chat, as OpenAI and ShareGPT write them."""

import json
from typing import Any

from stages.errors import MistakeError
from stages.records.record import Record
from stages.records.values import as_json, as_mappings, as_text, some
from stages.settings.section import nearest

Message = Record
CALLS = {"tool_calls", "function_call"}  # the second is the older name, of one call

ROLES = {  # ShareGPT's names
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


def to_chat(value: Any, where: str) -> list[Message]:
    """Messages with role and content as text, and what else they hold for the template.

    Args:
        value: a list of them, OpenAI's or ShareGPT's, or JSON of one; nothing is an empty chat.
        where: where it stands, for the sentence about a mistake.

    Raises:
        MistakeError: there is a message without role or content, or with more than text in its content.
    """
    messages = as_json(value, where)
    if messages is None:
        return []
    if isinstance(messages, dict) and all(isinstance(each, list) for each in messages.values()):
        messages = [dict(zip(messages, each, strict=True)) for each in zip(*messages.values(), strict=False)]
    if not isinstance(messages, list):
        raise MistakeError(f"{where} is no list of messages; write [{{role, content}}, …]")
    return [_message(message, f"{where} message {number}") for number, message in enumerate(messages, start=1)]


def unlearned(message: Message) -> Message:
    """A message that is not learned, unless it has a weight or spans of its own."""
    learned = message["role"] == "assistant" and not message.keys() & {"weight", "spans"}
    return message | {"weight": 0} if learned else message


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise MistakeError(f"{where} is no mapping; write role and content in every message")
    if "role" not in message and "from" in message:
        message = _renamed(message, where)
    kept = {key: value for key, value in message.items() if some(value) is not None}
    if not isinstance(kept.get("role"), str) or not ("content" in message or CALLS & kept.keys()):
        raise MistakeError(f"{where} needs role and content as text; write both in every message")
    kept["content"] = _content(kept.get("content"), f"{where} content")
    if call := as_json(kept.pop("function_call", None), f"{where} function_call"):
        kept["tool_calls"] = [{"type": "function", "function": call}]
    if calls := as_mappings(kept.pop("tool_calls", None), f"{where} tool_calls"):
        kept["tool_calls"] = [_with_arguments(call) for call in calls]
    return kept


def _with_arguments(call: Record) -> Record:
    """A call whose arguments are a mapping, as templates want them; OpenAI writes JSON of one."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return call | {"function": function | {"arguments": arguments}} if isinstance(arguments, dict) else call


def _renamed(message: Message, where: str) -> Message:
    """ShareGPT's message with OpenAI's keys."""
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    if message["from"] == "function_call":
        return {"role": "assistant", "content": None, "function_call": message.get("value"), **rest}
    if str(message["from"]) not in ROLES:
        raise MistakeError(
            f"{where} is from {message['from']!r}, which is no known role; {nearest(message['from'], ROLES)}"
        )
    text = {"content": message["value"]} if "value" in message else {}
    return {"role": ROLES[message["from"]], **text, **rest}


def _content(content: Any, where: str) -> str:
    """Text, or parts of text joined."""
    if not isinstance(content, list):
        return as_text(content, where)
    return "".join(part if isinstance(part, str) else _part(part, where) for part in content)


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else part
    raise MistakeError(f"{where} has a part {kind!r}, and only text is learned; leave such records out")
