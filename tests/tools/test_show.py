"""Tokens as they are shown."""

import io
import sys

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.conftest import train_bpe
from tools import cli
from tools.show import draw, texts

WORDS = ["<unk>", "▁one", "▁two", "!"]


def bytes_alone():
    return train_bpe("", 257)


def sentencepiece():
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


@pytest.mark.parametrize(
    ("make", "text", "expected"),
    [
        (bytes_alone, "4加🙂!", ["4", "", "", "加", "", "", "", "🙂", "!"]),
        (bytes_alone, "a\ufffdb", ["a", "", "", "", "\ufffdb"]),
        (sentencepiece, "one two!", ["one", " two", "!"]),
    ],
)
def test_each_token_shows_what_it_adds_to_the_text(make, text, expected):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make())
    ids = tokenizer(text)["input_ids"]
    assert texts(ids, tokenizer) == expected
    cut = texts(tokenizer("a加")["input_ids"][:-1], tokenizer)
    assert make is sentencepiece or cut == ["a", "", "\ufffd"]


def test_a_character_of_several_tokens_has_their_dots():
    assert draw(["4", "", "", "加", ""], [0.0, 0.0, 1.0, 1.0, 0.0], None) == "⟨0⟩4·⟨1⟩·加⟨0⟩"


def test_what_a_terminal_cannot_show_is_spelt_out(monkeypatch):
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="latin-1"))
    monkeypatch.setattr(sys, "argv", ["strata"])
    monkeypatch.setattr(cli, "overview", lambda: "é加")
    cli.main()
    sys.stdout.flush()
    assert terminal.getvalue() == b"\xe9\\u52a0\n"
