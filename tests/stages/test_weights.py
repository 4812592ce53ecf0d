"""Virtual checkpoints against PEFT's own merge of the whole model, and the single-file writer."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stages.files import BASE, CHECKPOINTS
from stages.weights.checkpoint import Checkpoint, open_stages
from stages.weights.single_file import write_single_file
from tests.conftest import ARCHITECTURES, make_base, make_stage


def load_base():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


def effective(stage):
    modules = stage.base.modules
    return {f"{path}.{name}": weight for path in modules for name, weight in stage.module(path).items()}


@pytest.mark.parametrize("shards", [False, True], ids=["one-file", "sharded"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", ["lora", "dora", "full", "ln"])
def test_effective_weights_equal_peft_bit_for_bit(method, architecture, shards):
    make_base(architecture, shards=shards)
    assert (len(list(BASE.glob("*.safetensors"))) > 1) == shards
    make_stage("one", load_base(), method, "1-2")
    _, (stage,) = open_stages(["one"])
    truth = PeftModel.from_pretrained(load_base(), CHECKPOINTS / "one").merge_and_unload().state_dict()

    found = effective(stage)

    assert found and all(torch.equal(found[name], truth[name]) for name in found)
    original = load_base().state_dict()
    moved = {name for name in found if not torch.equal(found[name], original[name])}
    assert moved and all(".1." in name or ".2." in name for name in moved)


def test_a_chain_applies_each_adapter_to_its_parents_weights():
    make_base("qwen3")
    first = make_stage("first", load_base(), "lora", "0-2").merge_and_unload()
    second = make_stage("second", first, "dora", "1-3", parent="first").merge_and_unload()
    third = make_stage("third", second, "ln", "all", parent="second").merge_and_unload()
    _, (stage,) = open_stages(["third"])
    truth = third.state_dict()

    assert all(torch.equal(weight, truth[name]) for name, weight in effective(stage).items())


def test_delta_is_the_stages_own_and_not_its_ancestors():
    make_base()
    first = make_stage("first", load_base(), "lora", "0")
    wrapped = make_stage("second", first.merge_and_unload(), "lora", "0-1", parent="first")
    layer = wrapped.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    dense = layer.scaling["default"] * (
        layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    )
    _, (stage,) = open_stages(["second"])

    delta = stage.delta("model.layers.0.mlp.up_proj")["weight"].double()

    assert torch.linalg.norm(delta - dense) < 1e-5 * torch.linalg.norm(dense)


def test_the_single_file_holds_what_it_was_given(workspace):
    tensors = {
        "b.weight": torch.randn(3, 5),
        "a.weight": torch.randn(7).bfloat16(),
        "ids": torch.arange(3),
        "empty": torch.zeros(0, 4),
    }
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
    specifications = {name: (list(t.shape), names[t.dtype]) for name, t in tensors.items()}

    write_single_file(workspace / "x.safetensors", specifications, tensors.__getitem__, {"format": "pt", "who": "me"})

    read = load_file(workspace / "x.safetensors")
    assert set(read) == set(tensors)
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)
    with safe_open(workspace / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "who": "me"}


def test_a_failed_write_leaves_no_file(workspace):
    with pytest.raises(ValueError, match="expected"):
        write_single_file(workspace / "x.safetensors", {"a": ([2], "F32")}, lambda _: torch.zeros(3), {})
    assert not (workspace / "x.safetensors").exists()


def test_header_is_read_without_the_tensors():
    make_base("llama-untied", torch.bfloat16)
    config = json.loads((BASE / "config.json").read_text())
    base = Checkpoint(BASE, "base")
    assert base.specification("lm_head.weight") == ([config["vocab_size"], config["hidden_size"]], "BF16")
