"""Rows as people have them, and the records that they are; or one sentence that shows what to write."""

import json
from datetime import datetime
from pathlib import Path

import pytest

from stages.errors import MistakeError
from stages.project.params import load_params
from stages.records.record import answer, is_empty, question
from stages.records.sources.file import LocalFile
from tests.conftest import PARAMS


def shaped(row, **keys):
    """A row of a jsonl file as a record, and what it was found to be."""
    Path("rows.jsonl").write_text(json.dumps(row) + "\n")
    records = LocalFile(source="file", path="rows.jsonl", eval=1, **keys).records("", "params.yaml: datasets.x")
    return records[0], records.found.told().removeprefix("jsonl, ")


def user(content, **keys):
    return {"role": "user", "content": content, **keys}


def assistant(content, **keys):
    return {"role": "assistant", "content": content, **keys}


def system(content):
    return {"role": "system", "content": content}


def human(value):
    return {"from": "human", "value": value}


def gpt(value, **keys):
    return {"from": "gpt", "value": value, **keys}


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


WRITTEN = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}  # as OpenAI has it
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}  # as templates want it
RESULT = {"role": "tool", "content": "2", "tool_call_id": "1", "name": "f"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"default": None}}}]
PAIR = {"prompt": "q", "completion": "a"}
CHAT = {"messages": [user("q"), assistant("a")]}
PROMPTS, CHATS, SHAREGPT = (
    "prompts and completions (prompt, completion",
    "chats (messages",
    "ShareGPT chats (conversations",
)

ROWS = {
    "text": ({"text": "a"}, {}, {"text": "a"}, "texts (text)"),
    "prompt": (PAIR, {}, PAIR, f"{PROMPTS})"),
    "numbers": ({"prompt": 7, "completion": 42}, {}, {"prompt": "7", "completion": "42"}, f"{PROMPTS})"),
    "gap in a column": ({"prompt": 0.5, "completion": 4.0}, {}, {"prompt": "0.5", "completion": "4"}, f"{PROMPTS})"),
    "ids": (
        {"input_ids": [1], "loss_weights": [1]},
        {},
        {"input_ids": [1], "loss_weights": [1]},
        "token ids (input_ids, loss_weights)",
    ),
    "others beside": (
        PAIR | {"id": 7, "task": "qa", "part": "x", "format": "pdf"},
        {},
        {"id": 7} | PAIR,
        f"{PROMPTS})",
    ),
    "a task of its own": (PAIR | {"task": "t", "entry": {}}, {}, {"task": "t", "entry": {}} | PAIR, f"{PROMPTS})"),
    "NaN beside": (PAIR | {"id": float("nan")}, {}, {"id": None} | PAIR, f"{PROMPTS})"),
    # OpenAI's chats
    "chat": (CHAT, {}, CHAT, f"{CHATS})"),
    "chat as text": ({"messages": json.dumps(CHAT["messages"])}, {}, CHAT, f"{CHATS})"),
    "parts of text": (
        {"messages": [user(parts("q", "!")), assistant(parts("a"))]},
        {},
        {"messages": [user("q!"), assistant("a")]},
        f"{CHATS})",
    ),
    "calls": (
        {"messages": [user("q"), assistant(None, tool_calls=[WRITTEN]), RESULT, assistant("a")], "tools": TOOLS},
        {},
        {"messages": [user("q"), assistant("", tool_calls=[CALL]), RESULT, assistant("a")], "tools": TOOLS},
        f"{CHATS}, tools)",
    ),
    "a call without content": (
        {"messages": [user("q"), {"role": "assistant", "tool_calls": [WRITTEN]}], "tools": json.dumps(TOOLS)},
        {},
        {"messages": [user("q"), {"role": "assistant", "tool_calls": [CALL], "content": ""}], "tools": TOOLS},
        f"{CHATS}, tools)",
    ),
    "thoughts and names": (
        {"messages": [user("q", name="Ann"), assistant("a", reasoning_content="hm", tool_calls=None)], "tools": []},
        {},
        {"messages": [user("q", name="Ann"), assistant("a", reasoning_content="hm")]},
        f"{CHATS}, tools)",
    ),
    "opened by the assistant": (
        {"messages": [assistant("a"), user("q"), user("r"), assistant("b")]},
        {},
        {"messages": [assistant("a"), user("q"), user("r"), assistant("b")]},
        f"{CHATS})",
    ),
    "system beside": (CHAT | {"system": "s"}, {}, {"messages": [system("s"), *CHAT["messages"]]}, f"{CHATS}, system)"),
    "no system beside": (CHAT | {"system": None}, {}, CHAT, f"{CHATS})"),
    # ShareGPT
    "sharegpt": ({"conversations": [human("q"), gpt("a")]}, {}, CHAT, f"{SHAREGPT})"),
    "sharegpt in messages": (
        {"messages": [human("q"), gpt("a", weight=0)]},
        {},
        {"messages": [user("q"), assistant("a", weight=0)]},
        f"{CHATS})",
    ),
    "openai in conversations": ({"conversations": CHAT["messages"]}, {}, CHAT, f"{SHAREGPT})"),
    "sharegpt with system": (
        {"conversations": [{"from": "system", "value": "s"}, human("q"), gpt("a")]},
        {},
        {"messages": [system("s"), *CHAT["messages"]]},
        f"{SHAREGPT})",
    ),
    "sharegpt with tools": (
        {
            "conversations": [
                human("q"),
                {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                {"from": "observation", "value": 2},
                gpt("a"),
            ]
        },
        {},
        {
            "messages": [
                user("q"),
                assistant("", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {}}}]),
                {"role": "tool", "content": "2"},
                assistant("a"),
            ]
        },
        f"{SHAREGPT})",
    ),
    "an older name of a call": (
        {"messages": [user("q"), assistant(None, function_call=WRITTEN["function"]), assistant("a")]},
        {},
        {
            "messages": [
                user("q"),
                assistant("", tool_calls=[{"type": "function", "function": CALL["function"]}]),
                assistant("a"),
            ]
        },
        f"{CHATS})",
    ),
    "lists of roles and contents": (
        {"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}},
        {},
        CHAT,
        f"{CHATS})",
    ),
    # Alpaca
    "alpaca": ({"instruction": "q", "input": "", "output": "a"}, {}, PAIR, "Alpaca (instruction, output, input)"),
    "alpaca with input": (
        {"instruction": "q", "input": "x", "output": "a"},
        {},
        {"prompt": "q\n\nx", "completion": "a"},
        "Alpaca (instruction, output, input)",
    ),
    "alpaca without input": ({"instruction": "q", "output": "a"}, {}, PAIR, "Alpaca (instruction, output)"),
    "alpaca with turns": (
        {"instruction": "q", "output": "a", "system": "s", "history": [["o", "p"]]},
        {},
        {"messages": [system("s"), user("o"), assistant("p"), *CHAT["messages"]]},
        "Alpaca (instruction, output, system, history)",
    ),
    # TRL
    "sides of messages": ({"prompt": [user("q")], "completion": [assistant("a")]}, {}, CHAT, f"{PROMPTS})"),
    "earlier answers": (
        {"prompt": [user("o"), assistant("p"), user("q")], "completion": [assistant("a")]},
        {},
        {"messages": [user("o"), assistant("p", weight=0), *CHAT["messages"]]},
        f"{PROMPTS})",
    ),
    "one side of messages": (
        {"prompt": [system("s"), user("q")], "completion": "a"},
        {},
        {"messages": [system("s"), *CHAT["messages"]]},
        f"{PROMPTS})",
    ),
    "system column": (
        PAIR | {"system": "s"},
        {},
        {"messages": [system("s"), *CHAT["messages"]]},
        f"{PROMPTS}, system)",
    ),
    "weights move with it": (
        PAIR | {"system": "s", "weight": 2, "prompt_weight": 0.5, "spans": [[0, 1, 3]]},
        {},
        {"messages": [system("s"), user("q", weight=0.5), assistant("a", weight=2, spans=[[0, 1, 3]])]},
        f"{PROMPTS}, system, weight, prompt_weight, spans)",
    ),
    "a prompt with tools": (PAIR | {"tools": TOOLS}, {}, PAIR | {"tools": TOOLS}, f"{PROMPTS}, tools)"),
    "Alpaca with all of it once more": (
        {"instruction": "q", "input": "", "output": "a", "text": "Do it.\n\nq\n\na"},
        {},
        PAIR,
        "Alpaca (instruction, output, input)",
    ),
    # two shapes, of which one is nothing
    "no text and no chat": (PAIR | {"text": "", "messages": []}, {}, PAIR, f"{PROMPTS})"),
    "null beside": ({"text": None, "messages": CHAT["messages"]}, {}, CHAT, f"{CHATS})"),
    # columns
    "named": (
        {"question": "q", "answer": "a", "text": "t"},
        {"columns": {"prompt": "question", "completion": "answer"}},
        PAIR,
        "prompts and completions (question, answer)",
    ),
    "by dots": (
        {"meta": {"q": ["x", "q"]}, "a.b": "a"},
        {"columns": {"prompt": "meta.q.1", "completion": "a.b"}},
        PAIR,
        "prompts and completions (meta.q.1, a.b)",
    ),
    "one of two shapes": (CHAT | {"prompt": "x"}, {"columns": {"messages": "messages"}}, CHAT, f"{CHATS})"),
    "named chat": (
        {"dialog": [human("q"), gpt("a")], "who": "s", "functions": TOOLS},
        {"columns": {"messages": "dialog", "system": "who", "tools": "functions"}},
        {"messages": [system("s"), *CHAT["messages"]], "tools": TOOLS},
        "chats (dialog, who, functions)",
    ),
    "named input": (
        {"instruction": "q", "context": "x", "response": "a"},
        {"columns": {"prompt": "instruction", "input": "context", "completion": "response"}},
        {"prompt": "q\n\nx", "completion": "a"},
        "prompts and completions (instruction, response, context)",
    ),
    # what the dataset's keys say
    "format": (PAIR, {"format": "chat"}, PAIR | {"format": "chat"}, f"{PROMPTS})"),
    "plain": (PAIR, {"format": "plain"}, PAIR | {"format": "plain"}, f"{PROMPTS})"),
    "plain text": ({"text": "a"}, {"format": "plain", "learn": "last"}, {"text": "a"}, "texts (text)"),
    "keywords": (
        CHAT | {"chat_template_kwargs": {"a": 1}},
        {"chat_template_kwargs": {"a": 2, "enable_thinking": False}},
        CHAT | {"chat_template_kwargs": {"a": 1, "enable_thinking": False}},
        f"{CHATS}, chat_template_kwargs)",
    ),
    "keywords of a prompt": (
        PAIR,
        {"chat_template_kwargs": {"a": 2}},
        PAIR | {"chat_template_kwargs": {"a": 2}},
        f"{PROMPTS})",
    ),
    "last": (
        {"messages": [user("o"), assistant("p"), user("q"), assistant("r", weight=1), user("s"), assistant("t")]},
        {"learn": "last"},
        {
            "messages": [
                user("o"),
                assistant("p", weight=0),
                user("q"),
                assistant("r", weight=1),
                user("s"),
                assistant("t"),
            ]
        },
        f"{CHATS})",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_the_record_that_is_meant(name):
    row, keys, record, told = ROWS[name]
    assert shaped(row, **keys) == (record, told)


NO_SHAPE = "which are no known shape; write in params.yaml what they are, such as columns"
WRONG = [
    (
        {"question": "q", "answer": "a"},
        {},
        f"has the columns question, answer, {NO_SHAPE}: {{prompt: question, completion: answer}}",
    ),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, {}, f"{NO_SHAPE}: {{prompt: prompt, completion: chosen}}"),
    (
        {"id": 1, "context": "c", "question": "q", "answers": {}},
        {},
        f"{NO_SHAPE}: {{prompt: question, completion: answers, input: context}}",
    ),
    (
        {"instruction": "q", "response": "a", "context": "c"},
        {},
        f"{NO_SHAPE}: {{prompt: instruction, completion: response, input: context}}",
    ),
    ({"input": "q", "output": "a"}, {}, f"{NO_SHAPE}: {{prompt: input, completion: output}}"),
    ({"content": "q"}, {}, f"has the columns content, {NO_SHAPE}: {{text: content}}"),
    ({}, {}, f"has the columns none, {NO_SHAPE}: {{text: TEXT}}"),
    (
        {"text": "a", "prompt": "b"},
        {},
        "has two shapes in one record, texts and prompts and completions; write which is meant",
    ),
    (
        {"text": "a", "instruction": "b", "output": "c", "input": "d"},
        {},
        "columns: {text: text} or columns: {prompt: instruction, completion: output, input: input}",
    ),
    (CHAT | {"conversations": [human("q")]}, {}, "has two shapes in one record, chats and ShareGPT chats"),
    (PAIR | {"completion": True}, {}, "completion is True and no text; write it as text"),
    (
        PAIR | {"completion": {"text": "a"}},
        {},
        "completion is no text but holds text; name the text in it with columns and",
    ),
    (
        PAIR | {"completion": ["a"]},
        {},
        "completion is no text but holds list; name the text in it with columns and dots",
    ),
    (
        PAIR,
        {"columns": {"prompt": "promt", "completion": "completion"}},
        "has no 'promt', which columns names; did you mean prompt?",
    ),
    (
        {"a": {"bc": 1}, "d": 1},
        {"columns": {"prompt": "a.bd", "completion": "d"}},
        "has no 'a.bd', which columns names; did you mean a.bc?",
    ),
    ({"a": ["b"]}, {"columns": {"text": "a.b"}}, "has no 'a.b', which columns names; did you mean a.0?"),
    ({"a": "b"}, {"columns": {"text": "a.b"}}, "has no 'a.b', which columns names; remove it"),
    # chats
    ({"messages": "hello"}, {}, "is text that is not JSON; write a list or mapping, or JSON of one"),
    ({"messages": {"role": "user"}}, {}, "is no list of messages; write [{role, content}, …]"),
    ({"messages": ["a"]}, {}, "message 1 is no mapping; write role and content in every message"),
    ({"messages": [user("q"), {"role": "assistant"}]}, {}, "message 2 needs role and content as text"),
    ({"messages": [{"content": "q"}, assistant("a")]}, {}, "message 1 needs role and content as text"),
    ({"messages": [user("q")]}, {}, "needs messages as a list of at least two turns"),
    ({"messages": [assistant("a"), user("q")]}, {}, "needs an assistant message as its last one"),
    (
        {"messages": [user([{"type": "image_url", "image_url": {}}]), assistant("a")]},
        {},
        "message 1 content has a part 'image_url', and only text is learned",
    ),
    (
        {"messages": [user("q"), assistant("", tool_calls={"name": "f"})]},
        {},
        "message 2 tool_calls is no list of mappings",
    ),
    (
        {"conversations": [human("q"), {"from": "gtp", "value": "a"}]},
        {},
        "message 2 is from 'gtp', which is no known role; did you mean gpt?",
    ),
    (CHAT | {"tools": {"name": "f"}}, {}, "tools is no list of mappings; write [{…}, …]"),
    (CHAT | {"tools": "f"}, {}, "tools is text that is not JSON"),
    (
        CHAT | {"chat_template_kwargs": [1]},
        {},
        "chat_template_kwargs is no mapping; write {enable_thinking: false} or the like",
    ),
    (
        {"messages": [system("s"), *CHAT["messages"]], "system": "t"},
        {},
        "has a system message and a column system; keep one",
    ),
    (
        {"prompt": [system("s"), user("q")], "completion": "a", "system": "t"},
        {},
        "has a system message and a column system; keep one",
    ),
    ({"instruction": "q", "output": "a", "history": 7}, {}, "has a history that is no list of [question, answer]"),
    ({"conversations": [{"from": ["human"], "value": "q"}]}, {}, "message 1 is from ['human'], which is no known role"),
    ({"instruction": "q", "output": "a", "history": ["b"]}, {}, "has a history that is no list of [question, answer]"),
    # what the dataset's keys say
    (
        CHAT,
        {"format": "plain"},
        "is a chat, which needs a chat template and does not go with format: plain; remove format",
    ),
    (
        PAIR | {"system": "s"},
        {"format": "plain"},
        "is a chat, which needs a chat template and does not go with format: plain",
    ),
    ({"text": "a"}, {"format": "chat"}, "is no chat, nor a prompt with its completion, which format: chat and"),
    ({"input_ids": [1], "loss_weights": [1]}, {"chat_template_kwargs": {"a": 1}}, "is no chat, nor a prompt with its"),
]


@pytest.mark.parametrize(("row", "keys", "sentence"), WRONG)
def test_a_row_that_may_be_meant_in_two_ways_is_one_sentence(row, keys, sentence):
    with pytest.raises(MistakeError) as mistake:
        shaped(row, **keys)
    assert str(mistake.value).startswith("rows.jsonl line 1") and sentence in str(mistake.value)
    assert "\n" not in str(mistake.value)


NAN = float("nan")


@pytest.mark.parametrize(
    ("row", "empty"),
    [
        ({"text": ""}, True),
        ({"text": None}, True),
        ({"text": NAN}, True),
        ({"text": " \n"}, True),
        ({"prompt": "q", "completion": None}, True),
        ({"prompt": NAN, "completion": "a"}, True),
        ({"prompt": "q", "completion": "a", "system": ""}, False),
        ({"prompt": "", "completion": "a", "system": "s"}, True),
        ({"prompt": None, "completion": None, "text": None}, True),
        ({"instruction": "", "input": "q", "output": "a"}, False),
        ({"messages": []}, True),
        ({"messages": None}, True),
        ({"messages": [user("q"), assistant(None)]}, True),
        ({"messages": [user(parts()), assistant("a")]}, True),
        ({"messages": [user("q"), assistant(None, tool_calls=[CALL])]}, False),
        ({"messages": [user("q"), assistant("", tool_calls=[CALL]), RESULT | {"content": ""}, assistant("a")]}, False),
        ({"messages": [system(""), user("q"), assistant("a")]}, False),
        ({"prompt": [], "completion": [assistant("")]}, True),
    ],
)
def test_nothing_to_ask_or_to_learn_is_empty(row, empty):
    assert is_empty(shaped(row)[0]) == empty


def test_a_call_has_no_reference_and_is_part_of_the_question():
    called = {"messages": [user("q"), assistant("", tool_calls=[CALL])]}
    assert answer(called) is None and question(called) == "q"
    texts = [
        question({"messages": [user("q"), assistant("", tool_calls=[call]), assistant("a")]}) for call in (CALL, {})
    ]
    assert texts[0] != texts[1] and answer(CHAT) == "a"


def test_dates_are_text():
    Path("rows.jsonl").write_text(json.dumps({"text": str(datetime(2026, 1, 31))}))
    assert LocalFile(source="file", path="rows.jsonl", eval=1).records("", "")[0] == {"text": "2026-01-31 00:00:00"}


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (
            "columns: {promt: a, completion: b}",
            "datasets.sums.columns.promt is no part of a record; did you mean prompt?",
        ),
        (
            "columns: {prompt: a}",
            "datasets.sums.columns should name text, messages, input_ids, or prompt and completion",
        ),
        (
            "columns: {prompt: a, completion: b, text: c}",
            "datasets.sums.columns should name text, messages, input_ids,",
        ),
        (
            "columns: {system: a}",
            "datasets.sums.columns should name text, messages, input_ids, or prompt and completion",
        ),
        ("columns: {text: 0}", "datasets.sums.columns.text is 0; it should be text"),
        ("format: chats", "datasets.sums.format is 'chats'; it should be 'auto', 'chat' or 'plain'"),
        ("learn: first", "datasets.sums.learn is 'first'; it should be 'all' or 'last'"),
        ("chat_template_kwargs: 1", "datasets.sums.chat_template_kwargs is 1; it needs its settings as keys below it"),
        (
            "format: plain\n    chat_template_kwargs: {a: 1}",
            "datasets.sums.chat_template_kwargs is of no use with format: plain",
        ),
    ],
)
def test_keys_of_a_dataset_that_do_not_go_together_are_one_sentence(workspace, keys, sentence):
    Path("params.yaml").write_text(PARAMS.replace("    train: 40", f"    train: 40\n    {keys}", 1))
    with pytest.raises(MistakeError) as mistake:
        load_params()
    assert sentence in str(mistake.value)
