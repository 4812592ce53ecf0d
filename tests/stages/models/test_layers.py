"""Layer ranges, and the modules they name in four architectures."""

import re

import pytest
from transformers import AutoModelForCausalLM

from stages.errors import MistakeError
from stages.files import BASE
from stages.methods import METHODS
from stages.models.architecture import exactly
from stages.models.layers import linear_modules, norm_modules, select
from stages.settings.ranges import parse
from tests.conftest import ARCHITECTURES, make_base


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ("3", [3]),
        ("0-2", [0, 1, 2]),
        ("4-5,0-1", [0, 1, 4, 5]),
        ("0-1, 1-3", [0, 1, 2, 3]),
        ("last 2", [4, 5]),
    ],
)
def test_ranges(text, numbers):
    assert parse(text, 6) == numbers


@pytest.mark.parametrize("text", ["", "-1", "0-6", "2-1", "last 0", "last 7", "0..3", "a"])
def test_no_ranges(text):
    with pytest.raises(MistakeError):
        parse(text, 6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_modules_of_each_kind(architecture):
    make_base(architecture)
    model = AutoModelForCausalLM.from_pretrained(BASE)
    modules = select(model, [1])
    linear, norm = linear_modules(model, modules), norm_modules(model, modules)
    expected = {"gpt2": (4, 2), "qwen3": (7, 4)}.get(architecture, (7, 2))
    assert (len(linear), len(norm)) == expected
    assert sorted(linear + norm) == sorted(modules)
    assert all(".1." in name for name in linear + norm)


def test_the_regex_matches_nothing_else():
    pattern = re.compile(exactly(["model.layers.1.mlp", "model.layers.2.mlp"]))
    assert pattern.fullmatch("model.layers.1.mlp")
    assert not pattern.fullmatch("model.layers.12.mlp")
    assert not pattern.fullmatch("model.layers.1xmlp")


def test_every_method_is_found_by_its_name():
    assert {"lora", "dora", "full", "ln"} <= set(METHODS)
    assert all(METHODS[name].name() == name for name in METHODS)
