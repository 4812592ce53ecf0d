"""Tokens, weights and checks of each record shape, and files read line by line."""

import json
from pathlib import Path

import pytest
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stages.errors import MistakeError
from stages.files import BASE
from stages.models.loading import load_tokenizer
from stages.models.source import locate
from stages.records.lines import Lines
from stages.records.record import answer, check, question
from stages.records.tokens import Example, encode, encode_question
from stages.settings.base import Base
from tests.conftest import make_base, make_tokenizer, train_bpe

TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def shown(record, tokenizer, length=100):
    (example,) = encode(check(record, "here"), tokenizer, length)
    assert len(example.ids) == len(example.weights)
    text = [chr(i) if i else "$" for i in example.ids]
    return "".join(text), "".join(t for t, learned in zip(text, example.weights, strict=True) if learned)


def weighted(record, template=TEMPLATE):
    """The record's text, and below each character one of `WEIGHTS`."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    (example,) = encode(check(record, "here"), tokenizer, 100)
    text = "".join(chr(i) if i else "$" for i in example.ids)
    return text, "".join(WEIGHTS[weight] for weight in example.weights)


WEIGHTS = {0.0: "0", 0.5: "h", 1.0: "1", 2.0: "2", 3.0: "3", -1.0: "-"}


def chat(*turns):
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return {"messages": [{"role": roles[role], "content": content} | keys for role, content, keys in turns]}


def test_completion_alone_is_learned_and_ends_the_text():
    assert shown({"prompt": "1+1=", "completion": "2"}, make_tokenizer()) == ("1+1=2$", "2$")


def test_text_is_learned_whole():
    assert shown({"text": "abc"}, make_tokenizer()) == ("abc$", "abc$")


def test_every_answer_of_a_chat_is_learned_and_nothing_else():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    turns = chat(("u", "q", {}), ("a", "r", {}), ("u", "s", {}), ("a", "t", {}))
    assert shown(turns, tokenizer) == ("<u>q$<a>r$<u>s$<a>t$", "r$t$")
    assert "".join(map(chr, encode_question(turns, tokenizer))).replace("\0", "$") == "<u>q$<a>r$<u>s$<a>"


def test_a_text_begins_as_the_tokenizer_begins_it():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "\x01"})
    asked = {"prompt": "1+1=", "completion": "2", "format": "plain"}
    assert shown(asked, tokenizer) == ("1+1=2$", "2$")  # a token that the tokenizer knows and does not put there
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="\x01 $A", special_tokens=[("\x01", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = TEMPLATE
    assert encode_question(asked, tokenizer) == tokenizer("1+1=")["input_ids"]
    assert encode(asked, tokenizer, None) == [Example([*tokenizer("1+1=2")["input_ids"], 0], [0.0] * 5 + [1.0] * 2)]
    assert encode({"text": "ab"}, tokenizer, None) == [
        Example([*tokenizer("ab")["input_ids"], 0], [0.0, 1.0, 1.0, 1.0])
    ]
    assert encode({"text": "ab"}, tokenizer, 2)[0].ids == tokenizer("a")["input_ids"]
    assert shown({"input_ids": [97], "loss_weights": [1]}, tokenizer) == ("a", "a")
    assert shown(chat(("u", "q", {}), ("a", "r", {})), tokenizer) == ("<u>q$<a>r$", "r$")  # the template's to say


def test_nothing_is_put_before_a_text_of_the_default_base():
    source = locate(Base(model="bundled:smollm2-135m-instruct"))
    tokenizer = AutoTokenizer.from_pretrained(source["pretrained_model_name_or_path"], gguf_file=source["gguf_file"])
    ids = tokenizer("a b", add_special_tokens=False)["input_ids"]
    assert encode({"text": "a b"}, tokenizer, None)[0].ids == [*ids, tokenizer.eos_token_id]
    assert encode_question({"prompt": "a b", "completion": "c", "format": "plain"}, tokenizer) == ids


@pytest.mark.parametrize(
    ("record", "text", "weights"),
    [
        ({"text": "abc", "weight": 0.5}, "abc$", "hhhh"),
        ({"text": "abc", "weight": 0}, "abc$", "0000"),
        ({"text": "abc", "weight": None, "spans": None}, "abc$", "1111"),
        ({"text": "abcd", "spans": [[1, 3, 2]]}, "abcd$", "12211"),
        ({"text": "abcd", "weight": 0, "spans": [[0, 3, 2], [2, 4, -1.0]]}, "abcd$", "22--0"),
        ({"text": "abcd", "spans": [[0.0, 4.0, 3.0]]}, "abcd$", "33331"),
        ({"prompt": "ab", "completion": "cd", "prompt_weight": 0.5, "format": "plain"}, "abcd$", "hh111"),
        ({"prompt": "ab", "completion": "cd", "weight": -1, "format": "plain"}, "abcd$", "00---"),
        ({"prompt": "ab", "completion": "cd", "spans": [[1, 2, 3]], "format": "plain"}, "abcd$", "00131"),
        ({"prompt": "", "completion": "cd", "weight": 2, "prompt_weight": 1, "format": "plain"}, "$cd$", "0222"),
        ({"prompt": " ab", "completion": "cd", "prompt_weight": 0.5}, "<u> ab$<a>cd$", "000hhhh000111"),
        ({"prompt": "ab", "completion": " cd ", "spans": [[0, 2, 3]]}, "<u>ab$<a>cd$", "000000000311"),
        (chat(("u", "qq", {}), ("a", "rr", {"weight": 2})), "<u>qq$<a>rr$", "000000000222"),
        (chat(("u", "qq", {"weight": 0.5}), ("a", "rr", {})), "<u>qq$<a>rr$", "000hhh000111"),
        (chat(("u", "qq", {"spans": [[1, 2, 3]]}), ("a", "rr", {})), "<u>qq$<a>rr$", "000030000111"),
        (
            chat(("u", "q", {}), ("a", "rrr", {"spans": [[0, 1, 0], [2, 3, -1]]})),
            "<u>q$<a>rrr$",
            "0000000001-1",
        ),
        # A message that is like what the template puts around it.
        (chat(("u", "u", {"weight": 1}), ("a", "a", {"spans": [[0, 1, 2]]})), "<u>u$<a>a$", "0001100021"),
        (chat(("s", "x", {"weight": 3}), ("u", "q", {}), ("a", "r", {})), "<s>x$<u>q$<a>r$", "000330000000011"),
        ({"input_ids": [97, 98, 0, 99], "loss_weights": [1, 0.5, 0, -1]}, "ab$c", "1h0-"),
    ],
)
def test_weights_of_every_character(record, text, weights):
    assert weighted(record) == (text, weights)


def test_weights_change_no_token():
    plain = chat(("u", "q w", {}), ("a", "r\n", {}))
    marked = chat(("u", "q w", {"weight": 1, "spans": [[1, 2, 0.5]]}), ("a", "r\n", {"spans": [[0, 1, 0]]}))
    assert weighted(plain)[0] == weighted(marked)[0]


def make_bpe():
    """A byte-level BPE as language models have it: words with the space before them, umlauts in two tokens."""
    return PreTrainedTokenizerFast(
        tokenizer_object=train_bpe("the answer is twelve", vocab_size=300), eos_token="<end>"
    )


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([[4, 10, 2]], [("the", 1), (" answer", 2), (" is", 1), (" twelve", 1), ("<end>", 1)]),  # without its space
        ([[3, 10, 2]], [("the", 1), (" answer", 2), (" is", 1), (" twelve", 1), ("<end>", 1)]),  # with it
        ([[0, 5, 2]], [("the", 2), (" answer", 2), (" is", 1), (" twelve", 1), ("<end>", 1)]),  # its first letter
        ([[5, 12, 2]], [("the", 1), (" answer", 1), (" is", 2), (" twelve", 1), ("<end>", 1)]),  # all but that
        ([[3, 4, 2]], [("the", 1), (" answer", 1), (" is", 1), (" twelve", 1), ("<end>", 1)]),  # the space alone
        ([[14, 20, 0]], [("the", 1), (" answer", 1), (" is", 1), (" twelve", 0), ("<end>", 1)]),
    ],
)
def test_a_token_has_the_weight_of_its_first_letter(spans, expected):
    tokenizer = make_bpe()
    (example,) = encode(check({"text": "the answer is twelve", "spans": spans}, "here"), tokenizer, 100)
    assert [(tokenizer.decode([i]), w) for i, w in zip(example.ids, example.weights, strict=True)] == expected


def test_all_tokens_of_one_character_have_its_weight():
    (example,) = encode({"text": "zäz", "spans": [[1, 2, 5]]}, make_bpe(), 100)
    assert example.weights == [1, 5, 5, 1, 1]


def test_long_examples_are_cut():
    assert shown({"text": "abcdef"}, make_tokenizer(), 3) == ("abc", "abc")
    assert encode({"input_ids": [5, 6, 7], "loss_weights": [1, 2, 3]}, make_tokenizer(), 2) == [Example([5, 6], [1, 2])]


def test_a_chat_without_a_template_is_refused():
    with pytest.raises(MistakeError, match="has no chat template for them"):
        encode(chat(("u", "q", {}), ("a", "r", {})), make_tokenizer(), 10)


@pytest.mark.parametrize(
    ("template", "keys", "sentence"),
    [
        ("{{ messages | length }}" + TEMPLATE, {}, "shows otherwise than it asks"),
        (
            TEMPLATE.replace("m.content", "m.content | trim"),
            {"spans": [[0, 1, 0]]},
            "that the chat template of base.model changes",
        ),
        (TEMPLATE.replace("m.content", "m.role"), {"spans": [[0, 1, 0]]}, "does not show what the assistant says"),
    ],
)
def test_a_template_that_the_weights_do_not_fit_is_refused(template, keys, sentence):
    with pytest.raises(MistakeError, match=sentence):
        weighted(chat(("u", "q", {}), ("a", " r", keys)), template)


def test_a_template_that_trims_is_no_matter_without_spans():
    assert weighted(chat(("u", "q", {}), ("a", " r", {})), TEMPLATE.replace("m.content", "m.content | trim")) == (
        "<u>q$<a>r$",
        "0000000011",
    )


def test_spans_without_offsets_are_refused(monkeypatch):
    def call(self, text, return_offsets_mapping=False, **_):
        if return_offsets_mapping:
            raise NotImplementedError
        return {"input_ids": [1]}

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", call)
    assert encode({"text": "a"}, make_tokenizer(), 10)[0].ids == [1, 0]
    with pytest.raises(
        MistakeError, match="does not tell which characters a token stands for; use records with input_"
    ):
        encode({"text": "a", "spans": [[0, 1, 2]]}, make_tokenizer(), 10)


def test_token_ids_that_the_tokenizer_lacks_are_refused():
    with pytest.raises(MistakeError, match=r"has input_ids up to 128, but base.model of params.yaml has 128 tokens"):
        encode({"input_ids": [128, 1], "loss_weights": [1, 1]}, make_tokenizer(), 10)


def test_tokens_that_the_embedding_has_no_row_for_are_refused(workspace):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    make_base()
    tokenizer.save_pretrained(BASE)
    tokenizer = load_tokenizer()
    assert encode({"text": "old"}, tokenizer, 10)
    sentence = "has the token '<new>', which is number 128, but base.model of params.yaml has an embedding of 128 rows"
    for ask in (lambda record: encode(record, tokenizer, 10), lambda record: encode_question(record, tokenizer)):
        with pytest.raises(MistakeError, match=sentence):
            ask({"prompt": "<new>", "completion": "a"})
    with pytest.raises(MistakeError, match=r"has input_ids up to 128, but base.model of params.yaml has 128 tokens"):
        encode({"input_ids": [128, 1], "loss_weights": [1, 1]}, tokenizer, 10)


def test_token_ids_and_text_have_no_answer_to_generate():
    ids = {"input_ids": [5, 61], "loss_weights": [1, 1]}
    assert answer(ids) is answer({"text": "a"}) is None
    assert encode_question(ids, make_tokenizer()) == encode_question({"text": "a"}, make_tokenizer()) == []
    assert question(ids) != question(ids | {"input_ids": [56, 1]})


INFINITE, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"text": "a", "weight": "1"}, "here has weight '1'; write a finite number"),
        ({"text": "a", "weight": True}, "here has weight True; write a finite number"),
        ({"text": "a", "weight": NAN}, "here has weight nan; write a finite number"),
        ({"prompt": "a", "completion": "b", "prompt_weight": INFINITE}, "here has prompt_weight inf; write a finite"),
        ({"text": "a", "spans": {"0": 1}}, "here has spans that are no list; write [[start, end, weight], …]"),
        (
            {"text": "a", "spans": [[0, 2, 1]]},
            "has span [0, 2, 1]; write [start, end, weight] with characters 0 ≤ start",
        ),
        ({"text": "ab", "spans": [[1, 1, 1]]}, "has span [1, 1, 1]; write [start, end, weight] with"),
        ({"text": "ab", "spans": [[-1, 1, 1]]}, "has span [-1, 1, 1];"),
        ({"text": "ab", "spans": [[0, 1.5, 1]]}, "has span [0, 1.5, 1];"),
        ({"text": "ab", "spans": [[0, 1, None]]}, "has span [0, 1, None];"),
        ({"text": "ab", "spans": [[0, 1, INFINITE]]}, "has span [0, 1, inf];"),
        ({"text": "ab", "spans": [[0, 1]]}, "has span [0, 1];"),
        ({"text": "ab", "spans": [7]}, "has span 7;"),
        ({"prompt": "abc", "completion": "d", "spans": [[0, 3, 1]]}, "0 ≤ start < end ≤ 1 and a finite weight"),
        (
            {"text": "a", "prompt_weight": 1},
            "has prompt_weight, which does not go with text; remove it or use weight and",
        ),
        (
            chat(("u", "q", {}), ("a", "r", {})) | {"weight": 1},
            "does not go with messages; remove it or use weight and sp",
        ),
        (chat(("u", "q", {"weight": "x"}), ("a", "r", {})), "here message 1 has weight 'x'; write a finite number"),
        (chat(("u", "qq", {}), ("a", "r", {"spans": [[0, 2, 1]]})), "here message 2 has span [0, 2, 1]; write"),
        ({"input_ids": [1], "loss_weights": [1], "spans": []}, "has spans, which does not go with input_ids"),
        ({"input_ids": [], "loss_weights": []}, "needs input_ids as a list of token ids"),
        ({"input_ids": [1, -1], "loss_weights": [1, 1]}, "needs input_ids as a list of token ids"),
        ({"input_ids": "1", "loss_weights": [1]}, "needs input_ids as a list of token ids"),
        ({"input_ids": [1, 2]}, "needs loss_weights as a list with a number for each of its 2 input_ids"),
        ({"input_ids": [1, 2], "loss_weights": [1]}, "needs loss_weights as a list with a number for each of its 2"),
        ({"input_ids": [1, 2], "loss_weights": [1, NAN]}, "has nan in loss_weights; write a finite number"),
    ],
)
def test_a_bad_weight_is_one_sentence(record, sentence):
    with pytest.raises(MistakeError) as mistake:
        check(record, "here")
    assert str(mistake.value).startswith("here ") and sentence in str(mistake.value)


def test_lines_of_a_file_are_records():
    records = [{"text": text} for text in ("a", "ä€", "c")]
    first, second, third = (json.dumps(record, ensure_ascii=False) for record in records)
    Path("rows.jsonl").write_text(f"{first}\n\n{second}\r\n  \n{third}", encoding="utf-8")
    lines = Lines(Path("rows.jsonl"))
    assert len(lines) == 3 and list(lines) == records
    assert lines[-1] == records[2] and lines[1:] == records[1:] and lines[5:] == []
    assert [lines.where(i) for i in range(3)] == ["rows.jsonl line 1", "rows.jsonl line 3", "rows.jsonl line 5"]
    with pytest.raises(IndexError):
        lines[3]


@pytest.mark.parametrize(
    ("line", "reason"), [(b"{1}", "Expecting property name"), (b'"\xff"', "can't decode byte 0xff")]
)
def test_a_line_that_is_no_json_is_named(line, reason):
    Path("rows.jsonl").write_bytes(b'{"text": "a"}\n\n' + line + b"\n")
    with pytest.raises(MistakeError) as mistake:
        list(Lines(Path("rows.jsonl")))
    assert str(mistake.value).startswith("rows.jsonl line 3 is not valid JSON (") and reason in str(mistake.value)


def test_an_empty_file_has_no_lines():
    Path("rows.jsonl").touch()
    assert list(Lines(Path("rows.jsonl"))) == []


def test_a_text_without_a_token_for_its_end_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(MistakeError, match="has no token for; give its tokenizer an eos_token"):
        encode({"prompt": "a", "completion": "b"}, tokenizer, 10)
    tokenizer.chat_template = TEMPLATE
    assert [example.ids[-1] for example in encode({"prompt": "a", "completion": "b"}, tokenizer, None)] == [0]
