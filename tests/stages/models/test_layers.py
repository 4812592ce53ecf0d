"""Layer ranges, and the modules they name in four architectures."""

import re

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from stages.errors import MistakeError
from stages.files import BASE
from stages.methods import METHODS
from stages.models.architecture import exactly, kind_of, layer_stack, place
from stages.models.layers import linear_modules, norm_modules, select
from stages.settings.ranges import parse
from tests.conftest import ARCHITECTURES, make_base
from tests.stages.models.test_every_architecture import OF_TYPE, TINY


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


ONE = {"mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj"}
MIXTURES = {
    "mixtral": {"experts": {"mlp.experts"}, "router": {"mlp.gate"}},
    "gpt_oss": {"experts": {"mlp.experts"}, "router": {"mlp.router"}},
    "qwen2_moe": {
        "experts": {"mlp.experts", *ONE},
        "shared_expert": ONE,
        "mlp.experts": {"mlp.experts"},
        "router": {"mlp.gate", "mlp.shared_expert_gate"},
    },
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_and_routers_are_groups_of_the_mlp(kind):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TINY))
    for group, kinds in MIXTURES[kind].items():
        assert set(select(model, {group: "1"})) == {f"model.layers.1.{each}" for each in kinds}
    both = {*select(model, {"experts": "1"}), *select(model, {"router": "1"})}
    assert set(select(model, {"mlp": "1"})) == both
    with pytest.raises(MistakeError, match="layers names 'experts', which no module of the model is called"):
        select(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY)), {"experts": "all"})


MAMBA = {"in_proj", "out_proj", "conv1d"}
HYBRIDS = {
    "falcon_h1": {
        "attention": {f"self_attn.{each}_proj" for each in "qkvo"},
        "mixer": {"mamba", *(f"mamba.{each}" for each in MAMBA)},
        "mlp": {f"feed_forward.{each}_proj" for each in ("gate", "up", "down")},
    },
    "recurrent_gemma": {
        "attention": {f"temporal_block.{each}_proj" for each in "qkvo"},
        "mixer": {f"temporal_block.{each}" for each in ("linear_x", "linear_y", "linear_out", "conv_1d", "rg_lru")},
        "mlp": {f"mlp_block.{each}_proj" for each in ("gate", "up", "down")},
    },
    "nemotron_h": {
        "attention": {f"mixer.{each}_proj" for each in "qkvo"},
        "mixer": {"mixer", *(f"mixer.{each}" for each in MAMBA)},
        "experts": {"mixer.experts", "mixer.shared_experts.up_proj", "mixer.shared_experts.down_proj"},
        "router": {"mixer.gate"},
    },
    "lfm2_moe": {
        "attention": {*(f"self_attn.{each}_proj" for each in "qkv"), "self_attn.out_proj"},
        "mixer": {"conv.conv", "conv.in_proj", "conv.out_proj"},
        "router": {"feed_forward.gate"},
    },
    "doge": {"router": {"mlp.router_gate"}},
    "gemma3n_text": {"mlp": {f"mlp.{each}_proj" for each in ("gate", "up", "down")}},
    "jetmoe": {"experts": {"mlp.input_linear", "mlp.output_linear"}, "router": {"mlp.router.layer"}},
}
LAYERS_OF = {
    "doge": {"is_moe": True},
    "lfm2_moe": OF_TYPE["lfm2_moe"],
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe"]},
    "recurrent_gemma": {"block_types": ["recurrent", "recurrent", "attention"]},
}


@pytest.mark.parametrize("kind", HYBRIDS)
def test_groups_of_hybrids_are_what_their_modules_do(kind):
    with torch.device("meta"):
        keys = TINY | {"head_dim": 8, "num_hidden_layers": 3}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **keys | LAYERS_OF.get(kind, {})))
    for group, kinds in HYBRIDS[kind].items():
        assert {place(path, layer_stack(model))[1] for path in select(model, {group: "all"})} == kinds, group


class Doubled(nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


class Chosen(nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden).topk(1)


class Best(nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden).amax(-1)


class Gated(nn.Linear):
    def forward(self, hidden, gate):
        return gate * super().forward(hidden)


DERIVED = {nn.Linear: "linear", Doubled: "linear", Chosen: "other", Best: "other", Gated: "other"}


@pytest.mark.parametrize(("derived", "kind"), DERIVED.items())
def test_what_is_derived_from_linear_is_a_matrix_where_it_gives_one_product(derived, kind):
    assert kind_of(derived(3, 2)) == kind


def test_the_regex_matches_nothing_else():
    pattern = re.compile(exactly(["model.layers.1.mlp", "model.layers.2.mlp"]))
    assert pattern.fullmatch("model.layers.1.mlp")
    assert not pattern.fullmatch("model.layers.12.mlp")
    assert not pattern.fullmatch("model.layers.1xmlp")


def test_every_method_is_found_by_its_name():
    assert {"lora", "dora", "full", "ln"} <= set(METHODS)
    assert all(METHODS[name].name() == name for name in METHODS)
