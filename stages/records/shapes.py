"""How rows as people have them become records: what a row is, is found out from the names of its columns."""

from dataclasses import dataclass
from typing import Any

from stages.errors import MistakeError
from stages.records.chats import Message, to_chat, unlearned
from stages.records.record import Record
from stages.records.rows import Found
from stages.records.values import as_json, as_mappings, as_text, look_up, some

Columns = dict[str, str]  # the column that each part of a record is taken from

WEIGHTS = ("weight", "prompt_weight", "spans", "loss_weights")
BESIDE = {part: part for part in ("system", "tools", "chat_template_kwargs", *WEIGHTS)}
NEEDED = ("text", "prompt", "completion", "messages", "input_ids")
PARTS = (*NEEDED, "input", *BESIDE)
OWN = {*PARTS, "format", "part"} - {"input", "system"}  # keys of a record: no other column may pass for one
ASKED = ("prompt", "question", "query", "instruction", "problem", "input")  # such are columns often called
GIVEN = ("input", "context", "passage")
ANSWERED = ("completion", "answer", "response", "output", "solution", "chosen", "target")


@dataclass(frozen=True)
class Shape:
    """What people call a kind of row, the columns that tell it, and others that it may have."""

    name: str
    needs: Columns
    may: Columns


SHAPES = [
    Shape("texts", {"text": "text"}, BESIDE),
    Shape("prompts and completions", {"prompt": "prompt", "completion": "completion"}, BESIDE),
    Shape("chats", {"messages": "messages"}, BESIDE),
    Shape("ShareGPT chats", {"messages": "conversations"}, BESIDE),
    Shape(
        "Alpaca", {"prompt": "instruction", "completion": "output"}, BESIDE | {"input": "input", "history": "history"}
    ),
    Shape("token ids", {"input_ids": "input_ids"}, BESIDE),
]


def named(columns: Columns) -> Shape | None:
    """The shape of what `columns` of a dataset names; None if that is no record."""
    needs = {part: column for part, column in columns.items() if part in NEEDED}
    may = {part: column for part, column in columns.items() if part not in NEEDED}
    return next((Shape(shape.name, needs, may) for shape in SHAPES if shape.needs.keys() == needs.keys()), None)


def to_record(row: Any, columns: Columns, where: str, found: Found) -> Record:
    """A row as a record, in which what is nothing is empty; columns beside it are kept where none are named.

    Args:
        row: a mapping, as the source holds it.
        columns: those that the dataset names, if any.
        where: the row's place, for the sentence about a mistake.
        found: notes the shape and its columns.

    Raises:
        MistakeError: the row is no mapping, fits no shape or two, or lacks what it needs.
    """
    if not isinstance(row, dict):
        raise MistakeError(f"{where} is no mapping of keys; write one record per line")
    shape = named(columns) or _find(row, where)
    there = shape.needs | {part: name for part, name in shape.may.items() if name in row or name.split(".")[0] in row}
    taken = {part: some(look_up(row, column, where)) for part, column in there.items()}
    filled = [column for part, column in there.items() if taken[part] is not None]
    found.note(row, shape.name, there.values(), filled)
    record = _build(taken, where)
    return record if columns else record | _beside(row, shape)


def _find(row: Record, where: str) -> Shape:
    """The one shape that a row has; of several, the one that is not null."""
    told = [shape for shape in SHAPES if any(column in row for column in shape.needs.values())]
    if len(told) > 1:
        filled = [
            shape for shape in told if any(some(row.get(each)) not in (None, "", []) for each in shape.needs.values())
        ]
        told = filled or told[:1]
    if [shape.name for shape in told] == ["texts", "Alpaca"] and str(row.get("output")) in str(row["text"]):
        told = told[1:]  # the text is the rest of the row once more, as in the dataset that the shape is called after
    if len(told) > 1:
        first, second = (
            _written(shape.needs | {part: name for part, name in shape.may.items() if some(row.get(name)) is not None})
            for shape in told[:2]
        )
        raise MistakeError(
            f"{where} has two shapes in one record, {told[0].name} and {told[1].name}; write which is meant in"
            f" params.yaml, {first} or {second}"
        )
    if not told or any(column not in row for column in told[0].needs.values()):
        names = [str(name) for name in row if name != ""]
        raise MistakeError(
            f"{where} has the columns {', '.join(names) or 'none'}, which are no known shape; write in params.yaml what"
            f" they are, such as {_written(_guess(names))}"
        )
    return told[0]


def _guess(names: list[str]) -> Columns:
    """What the columns might be, for a sentence."""
    asked, answered = (
        next((name for word in words for name in names if word in name.lower()), None) for words in (ASKED, ANSWERED)
    )
    if len(names) < 2:
        return {"text": names[0] if names else "TEXT"}
    given = next((name for word in GIVEN for name in names if word == name.lower() != asked), None)
    found = {"prompt": asked or names[0], "completion": answered or names[1]}
    return found | {"input": given} if given else found


def _written(columns: Columns) -> str:
    return f"columns: {{{', '.join(f'{part}: {column}' for part, column in columns.items())}}}"


def _beside(row: Record, shape: Shape) -> Record:
    """Columns that are not taken, which a scorer may want; a task is one with its entry alone."""
    left = set(row) - OWN - set((shape.needs | shape.may).values())
    if "entry" not in row:
        left.discard("task")
    return {column: some(row[column]) for column in row if column in left}


def _build(taken: dict[str, Any], where: str) -> Record:
    """A record of the parts of a row."""
    weights = {key: taken[key] for key in WEIGHTS if taken.get(key) is not None}
    if "text" in taken:
        return {"text": as_text(taken["text"], f"{where} text")} | weights
    if "input_ids" in taken:
        return {"input_ids": taken["input_ids"]} | weights
    template = _template(taken, where)
    if "messages" in taken:
        return {"messages": _opened(to_chat(taken["messages"], where), taken, where)} | weights | template
    prompt, completion = (_side(taken[part], f"{where} {part}") for part in ("prompt", "completion"))
    given = as_text(taken.get("input"), f"{where} input")
    if given.strip() and isinstance(prompt, str):
        prompt = f"{prompt}\n\n{given}" if prompt.strip() else given
    if isinstance(prompt, str) and isinstance(completion, str) and not _opened([], taken, where):
        return {"prompt": prompt, "completion": completion} | weights | template
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt} | _moved(weights, {"prompt_weight": "weight"})]
    if isinstance(completion, str):
        own = _moved(weights, {"weight": "weight", "spans": "spans"})
        completion = [{"role": "assistant", "content": completion} | own]
    asked = _opened([*map(unlearned, prompt)], taken, where)
    return {"messages": [*asked, *completion]} | weights | template


def _side(value: Any, where: str) -> str | list[Message]:
    """A prompt or completion: text or, as TRL has it too, messages."""
    messages = isinstance(value, list) and all(isinstance(each, dict) for each in value)
    return to_chat(value, where) if messages else as_text(value, where)


def _moved(weights: Record, names: Columns) -> Record:
    """Weights of a prompt or completion as those of the message that it becomes."""
    return {new: weights.pop(old) for old, new in names.items() if old in weights}


def _opened(messages: list[Message], taken: dict[str, Any], where: str) -> list[Message]:
    """Messages after what other columns put before them: the system's, and earlier turns."""
    system = as_text(taken.get("system"), f"{where} system")
    if system.strip() and messages and messages[0]["role"] == "system":
        raise MistakeError(f"{where} has a system message and a column system; keep one of them")
    opening = [{"role": "system", "content": system}] if system.strip() else []
    history = as_json(taken.get("history"), f"{where} history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise MistakeError(f"{where} has a history that is no list of [question, answer]; write it so")
    for pair in history:
        opening += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
    return [*to_chat(opening, f"{where} history"), *messages] if opening else messages


def _template(taken: dict[str, Any], where: str) -> Record:
    """What the chat template is given beside the messages."""
    tools = as_mappings(taken.get("tools"), f"{where} tools")
    keywords = as_json(taken.get("chat_template_kwargs"), f"{where} chat_template_kwargs")
    if not isinstance(keywords, dict | None):
        raise MistakeError(f"{where} chat_template_kwargs is no mapping; write {{enable_thinking: false}} or the like")
    return {key: value for key, value in (("tools", tools), ("chat_template_kwargs", keywords)) if value}
