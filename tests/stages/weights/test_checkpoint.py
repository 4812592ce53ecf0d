"""Virtual checkpoints against PEFT's own merge of the whole model, and the single-file writer."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from stages.errors import MistakeError
from stages.files import BASE, CHECKPOINTS
from stages.weights.checkpoint import Checkpoint, open_stages
from stages.weights.single_file import single_file
from stages.weights.tensor_file import TensorFile
from tests.conftest import ARCHITECTURES, COMMON, MIXTURES, ROOT, make_base, make_stage


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


@pytest.mark.parametrize("keys", [{"rank": 3}, {"rank": 3, "rslora": True}], ids=["lora", "rslora"])
@pytest.mark.parametrize("architecture", MIXTURES)
def test_experts_and_routers_equal_peft_bit_for_bit(architecture, keys):
    make_base(architecture)
    wrapped = make_stage("one", load_base(), "lora", {"experts": "1-2", "router": "2"}, **keys)
    _, (stage,) = open_stages(["one"])
    with torch.no_grad():
        computed = wrapped.eval()(torch.arange(20)[None]).logits
        again = PeftModel.from_pretrained(load_base(), CHECKPOINTS / "one").eval()
        assert torch.equal(again(torch.arange(20)[None]).logits, computed)
    truth, original, found = again.merge_and_unload().state_dict(), load_base().state_dict(), effective(stage)

    assert found.keys() == truth.keys() and all(torch.equal(found[name], truth[name]) for name in found)
    moved = {name.split(".", 2)[2] for name in found if not torch.equal(found[name], original[name])}
    router = "router" if architecture == "gpt_oss" else "gate"
    stacks = {f"{layer}.mlp.experts.{name}_proj" for layer in (1, 2) for name in ("gate_up", "down")}
    assert moved == {*stacks, f"2.mlp.{router}.weight"}


@pytest.mark.parametrize("shards", [False, True], ids=["one-file", "sharded"])
def test_files_that_transformers_does_not_load_are_not_read(shards):
    make_base(shards=shards)
    save_file({"model.norm.weight": torch.zeros(32), "old": torch.zeros(1)}, BASE / "model_old.safetensors")
    base, truth = Checkpoint(BASE, "base"), load_base().state_dict()
    assert "old" not in base.modules and torch.equal(base.module("model.norm")["weight"], truth["model.norm.weight"])


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": {"a": "../model/model.safetensors"}}'])
def test_an_index_that_is_none_or_leads_out_of_its_folder_is_one_sentence(index):
    make_base(shards=True)
    (BASE / "model.safetensors.index.json").write_text(index)
    with pytest.raises(
        MistakeError,
        match=r"index.json (does not name files of its folder; download|is not valid JSON|holds \[\] and no object)",
    ):
        Checkpoint(BASE, "base")


def narrower():
    LlamaForCausalLM(LlamaConfig(**COMMON | {"intermediate_size": 48})).save_pretrained(BASE)


def spoiled():
    (CHECKPOINTS / "one/adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (lambda: make_base("gpt2"), r"layers.1.\S+.weight belongs to no module of the base; use an adapter that was"),
        (
            narrower,
            r"lora_A.weight is \[3, 64\], which does not fit \S+.down_proj.weight of \[32, 48\]; use",
        ),
        (spoiled, "checkpoints/one/adapter_config.json is none of PEFT's; delete checkpoints/one, and run `dvc repro`"),
    ],
)
def test_a_stage_that_is_not_of_the_base_as_it_is_now_is_one_sentence(changed, sentence):
    make_base("llama-untied")
    make_stage("one", load_base(), "lora", {"down_proj": "1"}, rank=3)
    changed()
    with pytest.raises(MistakeError, match=sentence):
        open_stages(["one"])


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

    with single_file(workspace / "x.safetensors", specifications, {"format": "pt", "who": "me"}) as file:
        for name in ("ids", "a.weight", "empty", "b.weight"):
            file.put(name, tensors[name])

    read = load_file(workspace / "x.safetensors")
    assert set(read) == set(tensors)
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)
    with safe_open(workspace / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "who": "me"}


def test_a_failed_write_leaves_no_file(workspace):
    with (
        pytest.raises(ValueError, match="expected"),
        single_file(Path("x.safetensors"), {"a": ([2], "F32")}, {}) as file,
    ):
        file.put("a", torch.zeros(3))
    assert not list(workspace.glob("x*"))


def test_a_full_disk_is_told_before_the_work_and_leaves_no_file(workspace):
    """The limit on file size stands in for the disk: the kernel refuses the room in the same call."""
    code = """
import resource, torch
from pathlib import Path
from stages.errors import run
from stages.weights.single_file import single_file
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
def main():
    with single_file(Path("x.safetensors"), {"a": ([1000], "F32")}, {}):
        print("the work has begun")
run(main)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        "error: x.safetensors cannot be written (File too large); it needs 0.00 GB on a disk that is writable\n"
    )
    assert not list(workspace.glob("x*"))


def header(entries, length=None):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


@pytest.mark.parametrize(
    "content",
    [
        header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}) + bytes(12),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, length=1 << 40) + bytes(4),
        header(
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
            }
        )
        + bytes(12),
        header({"a": {"dtype": "F32", "shape": [1 << 62, 8], "data_offsets": [0, 4]}}) + bytes(4),
        b"",
    ],
    ids=["truncated", "header beyond the file", "overlapping", "overflowing shape", "empty"],
)
def test_a_truncated_or_hostile_file_is_refused_in_one_sentence(workspace, content):
    Path("x.safetensors").write_bytes(content)
    with pytest.raises(MistakeError, match=r"^x.safetensors is not a whole safetensors file \(.*\); delete it"):
        TensorFile(Path("x.safetensors"))


def test_pieces_are_the_tensor(monkeypatch):
    monkeypatch.setattr("stages.weights.tensor_file.PIECE", 64)
    make_base("llama-untied", torch.bfloat16)
    base = Checkpoint(BASE, "base")
    ((name, _),) = base.pieces("lm_head.weight")
    file = base.file(name)
    assert torch.equal(torch.cat(list(file.pieces(name))), file.read(name).flatten())
    assert torch.equal(file.read(name), load_file(BASE / "model.safetensors")[name])


def test_header_is_read_without_the_tensors():
    make_base("llama-untied", torch.bfloat16)
    config = json.loads((BASE / "config.json").read_text())
    base = Checkpoint(BASE, "base")
    assert base.specification("lm_head.weight") == ([config["vocab_size"], config["hidden_size"]], "BF16")
