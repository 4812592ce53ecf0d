"""What `strata check` says of the tokens, beside what plain transformers does."""

from pathlib import Path

import pytest

from stages.errors import MistakeError
from stages.project.check import load_checked
from tests.stages.records.test_template import CHAT, PHI, TEMPLATES, TOKENIZERS
from tools.check import hold_against_use


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_kind_of_template_is_used_as_it_is_learned(name, kind):
    tokenizer = TOKENIZERS[kind]
    tokenizer.chat_template, _, end = TEMPLATES[name]
    said = hold_against_use(CHAT, tokenizer, [tokenizer.convert_tokens_to_ids(end)], "datasets.a")
    assert said == f"asked as a chat; an answer ends with {end}"


def test_a_pair_in_plain_text():
    tokenizer = TOKENIZERS["sentence-piece"]
    record = {"prompt": "a", "completion": "b", "format": "plain"}
    assert hold_against_use(record, tokenizer, [tokenizer.eos_token_id], "datasets.a").startswith("asked in plain text")


def test_an_end_at_which_the_model_does_not_stop_is_told():
    tokenizer = TOKENIZERS["byte-level"]
    tokenizer.chat_template = PHI
    with pytest.raises(MistakeError, match=r"params.yaml: datasets.a has answers that end with '<\|over\|>', at which"):
        hold_against_use(CHAT, tokenizer, [tokenizer.eos_token_id], "datasets.a")


def test_tokens_that_are_not_those_of_use_are_told(monkeypatch):
    tokenizer = TOKENIZERS["byte-level"]
    tokenizer.chat_template = PHI
    monkeypatch.setattr("tools.check.dated", lambda template: template + " ")
    with pytest.raises(MistakeError, match=r"datasets.a is asked with other tokens in training than in use"):
        hold_against_use(CHAT, tokenizer, [tokenizer.convert_tokens_to_ids("<|over|>")], "datasets.a")


@pytest.mark.parametrize("text", ["", "schema: '2.0'\n", "schema: '2.0'\nstages:\n  base:\n    cmd: [\n"])
def test_a_lock_file_that_dvc_was_killed_over_is_told(project, text):
    Path("dvc.lock").write_text(text)
    with pytest.raises(
        MistakeError, match=r"dvc.lock is broken, as where dvc was killed while it wrote it; run rm dvc.lo"
    ):
        load_checked()
