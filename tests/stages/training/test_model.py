"""What a stage trains is what its layers name, and what learns nothing is told."""

from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator

from stages.errors import MistakeError
from stages.files import BASE
from stages.methods import METHODS
from stages.training.loop import Run
from stages.training.model import put_on
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
