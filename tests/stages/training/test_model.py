"""What a stage trains is what its layers name, and what learns nothing is told."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stages.errors import MistakeError
from stages.files import BASE, CHECKPOINTS, publish, write_json
from stages.merge import write
from stages.merging.merged import Merged
from stages.methods import METHODS
from stages.settings.merge import Merge
from stages.training.loop import Run
from stages.training.model import put_on, refuse_moved, refuse_unsaved, sums_of_frozen
from stages.weights.checkpoint import open_stages
from tests.conftest import make_tokenizer
from tests.stages.models.test_every_architecture import TINY, build
from tests.stages.test_train import make_examples


def put(kind, method="lora", layers="1", steps=1, **keys):
    model = build(kind, TINY | {"head_dim": 8})
    model.save_pretrained(BASE)
    make_tokenizer().save_pretrained(BASE)
    stage = METHODS[method](parent="base", dataset="d", method=method, lr=0.01, steps=steps, layers=layers, **keys)
    return stage, put_on(stage, model, torch.float32)


def test_an_adapter_that_peft_puts_elsewhere_is_refused(workspace, monkeypatch):
    put("mixtral")
    monkeypatch.setattr("stages.training.model.patch", lambda _: nullcontext())  # as PEFT does by itself
    with pytest.raises(
        MistakeError, match=r"^method 'lora' is not put by PEFT on exactly what layers names, but .*\.0\."
    ):
        put("mixtral")


def test_an_adapter_beside_a_weight_that_the_model_reads_itself_is_told(workspace):
    stage, wrapped = put("jamba", layers="0-1")
    with pytest.warns(UserWarning, match=r"mamba\.dt_proj of jamba learns nothing by method 'lora'"):
        Run(wrapped, stage, Accelerator(cpu=True)).step([make_examples(2)], 0)
    stage, wrapped = put("jamba", layers="0", init="pissa")
    with pytest.raises(
        MistakeError, match=r"^init starts from the weights, but .*mamba\.dt_proj of jamba learns nothing"
    ):
        Run(wrapped, stage, Accelerator(cpu=True)).step([make_examples(2)], 0)


MATRICES_APART = [
    {"method": "dora"},
    {"dropout": 0.1},
    {"init": "pissa"},
    {"load_in_4bit": True},
    {"method": "ia3"},
    {"method": "vera"},
    {"method": "adalora", "steps": 20},
    {"method": "miss"},
    {"method": "peft", "peft": {"peft_type": "LOHA"}},
]


@pytest.mark.parametrize("keys", MATRICES_APART, ids=str)
def test_what_peft_does_not_put_beside_experts_is_refused_with_a_way_out(workspace, keys):
    refused = r"experts and routers of Mixtral.* layers: \{q_proj: all, .*, or choose lora without dropout, init and"
    with pytest.raises(MistakeError, match=refused):
        put("mixtral", **keys)
    put("mixtral", layers={"attention": "1"}, **{key: value for key, value in keys.items() if key != "load_in_4bit"})


@pytest.mark.parametrize("layers", ["1", {"experts": "1"}, {"router": "1"}, {"q_proj": "0", "experts": "1"}], ids=str)
def test_experts_and_routers_are_trained_as_parameters_of_no_module(workspace, layers):
    stage, wrapped = put("mixtral", layers=layers, rank=3)
    trained = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
    experts, router, attention = 4 * 3 * (32 + 2 * 64 + 64 + 32), 3 * (32 + 4), 3 * (4 * 32 + 2 * 32 + 2 * 16)
    if layers == "1":
        assert trained == experts + router + attention
    elif "q_proj" in layers:
        assert trained == experts + 3 * 64
    else:
        assert trained == (experts if "experts" in layers else router)
    before = {name: p.clone() for name, p in wrapped.named_parameters()}
    run = Run(wrapped, stage, Accelerator(cpu=True))
    run.step([make_examples(4)], 0)
    moved = {name for name, p in wrapped.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".lora_B." in name}  # A moves once B is no longer zero


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("keys", [{}, {"rslora": True}, {"layers": {"shared_experts": "1"}, "dropout": 0.1}], ids=str)
def test_peft_by_itself_takes_shared_experts_for_what_they_are(workspace, keys):
    stage, wrapped = put("glm4_moe", **{"layers": "0-1"} | keys)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    with publish(CHECKPOINTS / "one") as folder:
        stage.save(wrapped, folder)
        write_json(folder / "stage.json", {"name": "one", "parent": "base"})
    write_json(BASE / "stage.json", {"name": "base", "model": "model", "revision": None})
    truth = wrapped.merge_and_unload().state_dict()

    base, (opened,) = open_stages(["one"])
    assert opened.adapter.is_low_rank("model.layers.1.mlp.shared_experts.up_proj")
    write(Merged(base, [opened], Merge(weights={"one": 1.0}, outputs=["adapter"])), workspace, {"format": "pt"})
    for folder, near in ((CHECKPOINTS / "one", 0), (workspace / "adapter", 1e-6)):
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), folder).merge_and_unload()
        for name, weights in loaded.state_dict().items():
            assert torch.allclose(weights, truth[name], rtol=0, atol=near), f"{name} in {folder}"
    for path in base.modules:
        for name, weights in opened.module(path).items():
            assert torch.equal(weights, truth[f"{path}.{name}"])


@pytest.mark.filterwarnings("ignore")
def test_of_a_copied_module_the_method_trains_its_own_alone(workspace):
    _, wrapped = put("gpt_oss", "full", layers={"self_attn": "1"})  # its sinks, and not the projections in it
    trained = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert trained == ["base_model.model.model.layers.1.self_attn.ln_tuning_layers.default.sinks"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_weight_that_moves_is_told(workspace, dtype):
    stage, wrapped = put("llama")
    wrapped.to(dtype)
    before = sums_of_frozen(wrapped)
    with torch.no_grad():
        wrapped.get_submodule("base_model.model.model.layers.1.mlp.up_proj.lora_B.default").weight.add_(1)
    refuse_moved(stage, wrapped, before)
    with torch.no_grad():
        wrapped.get_submodule("base_model.model.model.layers.0.mlp.up_proj").weight[0, 0].mul_(1.01)
    with pytest.raises(
        MistakeError, match=r"^method 'lora' changed .*layers\.0\.mlp\.up_proj.weight, which layers does"
    ):
        refuse_moved(stage, wrapped, before)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_file_without_all_that_was_trained_or_with_a_nan_is_told(workspace, method):
    stage, wrapped = put("llama", method)
    folder = Path("saved")
    stage.save(wrapped, folder)
    refuse_unsaved(stage, wrapped, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] * torch.nan}, folder / "adapter_model.safetensors")
    with pytest.raises(MistakeError, match=rf"^lr 0\.01 made numbers of {name} infinite"):
        refuse_unsaved(stage, wrapped, folder)
    save_file({each: tensors[each] for each in tensors if each != name}, folder / "adapter_model.safetensors")
    with pytest.raises(MistakeError, match=rf"^method '{method}' trained .* and does not save it"):
        refuse_unsaved(stage, wrapped, folder)


def test_a_state_that_a_model_keeps_in_a_copied_module_is_the_copys(workspace):
    _, wrapped = put("recurrent_gemma", "full", "0-1")
    block = wrapped.get_base_model().model.layers[0].temporal_block
    block.rg_lru.recurrent_states = state = torch.ones(1)
    assert block.rg_lru.ln_tuning_layers["default"].recurrent_states is state
    assert block.rg_lru.base_layer.recurrent_states is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_moe"])
def test_the_rank_is_that_of_each_expert_and_all_of_them_are_counted(workspace, kind):
    _, wrapped = put(kind, "lora", layers={"mlp.experts": "1"}, rank=3)
    trained = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
    assert trained == 4 * 3 * ((32 + 2 * 64) + (64 + 32))  # experts, rank, and both sides of two matrices
