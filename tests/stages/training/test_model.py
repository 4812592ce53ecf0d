"""What a stage trains is what its layers name, and what learns nothing is told."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from stages.errors import MistakeError
from stages.files import BASE
from stages.methods import METHODS
from stages.training.loop import Run
from stages.training.model import put_on, refuse_moved, refuse_unsaved, sums_of_frozen
from tests.conftest import make_tokenizer
from tests.stages.models.test_every_architecture import TINY, build
from tests.stages.test_train import make_examples


def put(kind, method="lora", layers="1", **keys):
    model = build(kind, TINY | {"head_dim": 8})
    model.save_pretrained(BASE)
    make_tokenizer().save_pretrained(BASE)
    stage = METHODS[method](parent="base", dataset="d", method=method, lr=0.01, steps=1, layers=layers, **keys)
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
    stage, wrapped = put("jamba", layers="0-1", init="pissa")
    with pytest.raises(
        MistakeError, match=r"^init starts from the weights, but .*mamba\.dt_proj of jamba learns nothing"
    ):
        Run(wrapped, stage, Accelerator(cpu=True)).step([make_examples(2)], 0)


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
