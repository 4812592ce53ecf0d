"""Tokens and supervision of each record shape."""

import pytest

from stages.errors import MistakeError
from stages.records import encode, encode_question
from tests.conftest import make_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}.{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def shown(record, tokenizer, length=100):
    example = encode(record, tokenizer, length)
    assert len(example.ids) == len(example.weights)
    text = [chr(i) if i else "$" for i in example.ids]
    return "".join(text), "".join(t for t, learned in zip(text, example.weights, strict=True) if learned)


def test_completion_alone_is_learned_and_ends_the_text():
    assert shown({"prompt": "1+1=", "completion": "2"}, make_tokenizer()) == ("1+1=2$", "2$")


def test_text_is_learned_whole():
    assert shown({"text": "abc"}, make_tokenizer()) == ("abc$", "abc$")


def test_every_answer_of_a_chat_is_learned_and_nothing_else():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    roles = ["user", "assistant", "user", "assistant"]
    chat = {"messages": [{"role": r, "content": c} for r, c in zip(roles, "qrst", strict=True)]}
    assert shown(chat, tokenizer) == ("<u>q.<a>r.<u>s.<a>t.", "r.t.")
    assert "".join(map(chr, encode_question(chat, tokenizer))) == "<u>q.<a>r.<u>s.<a>"


def test_long_examples_are_cut():
    assert shown({"text": "abcdef"}, make_tokenizer(), 3) == ("abc", "abc")


def test_a_chat_without_a_template_is_refused():
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]}
    with pytest.raises(MistakeError, match="has no chat template for records with messages"):
        encode(chat, make_tokenizer(), 10)


def test_a_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]}
    with pytest.raises(MistakeError, match="rewrites earlier turns"):
        encode(chat, tokenizer, 10)
