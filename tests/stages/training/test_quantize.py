"""Frozen weights in four bits: the numbers that the paper's code book gives, and adapters that train on them."""

import sys

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from stages.errors import MistakeError
from stages.files import BASE, CHECKPOINTS, write_json
from stages.models.loading import device
from stages.training.loop import Run
from stages.training.model import put_on
from stages.training.quantize import quantize
from stages.weights.checkpoint import open_stages
from tests.conftest import ARCHITECTURES, COMMON, make_base
from tests.stages.test_train import fit, make_examples, make_stage

pytestmark = pytest.mark.gpu
pytest.importorskip("bitsandbytes", reason="an extra that most do not need: uv sync --extra four-bit")

NF4 = [  # appendix E of arXiv 2305.14314
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def in_nf4(weight):
    blocks = weight.flatten().unflatten(0, (-1, 64))
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks[..., None] / scale[..., None] - torch.tensor(NF4)).abs().argmin(-1)
    return (torch.tensor(NF4)[nearest] * scale).view_as(weight), scale.expand_as(blocks).reshape(weight.shape)


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    sizes = COMMON | {"hidden_size": 64, "intermediate_size": 128}
    monkeypatch.setitem(ARCHITECTURES, "wide", lambda: LlamaForCausalLM(LlamaConfig(**sizes)))


def made(method="lora", architecture="wide"):
    make_base(architecture)
    stage = make_stage(method, load_in_4bit=True, steps=25)
    torch.manual_seed(0)
    model = put_on(stage, AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), torch.float32)
    quantize(model, torch.float32, device())
    return stage, model.to(device())


def test_frozen_matrices_of_the_layers_are_in_nf4_and_nothing_else_is():
    from bitsandbytes.functional import dequantize_4bit

    _, model = made()
    exact = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    inner = model.get_base_model()
    smaller = {n: p for n, p in inner.named_parameters() if type(p).__name__ == "Params4bit"}
    assert len(smaller) == 4 * 7
    for name, parameter in smaller.items():
        weight = exact.get_parameter(name.replace(".base_layer", ""))
        found = dequantize_4bit(parameter.data, parameter.quant_state).cpu()
        truth, scale = in_nf4(weight)
        assert ((found - truth).abs() <= 0.02 * scale).all()  # the scales too are rounded, to eight bits
        assert parameter.nbytes * 8 == weight.nbytes
    assert {p.dtype for p in inner.parameters() if p.requires_grad} == {torch.float32}
    assert inner.lm_head.weight.dtype == torch.float32
    layer, inputs = inner.model.layers[3].mlp.up_proj, torch.randn(5, 64, device=device())
    truth = inputs @ dequantize_4bit(layer.weight.data, layer.weight.quant_state).T
    assert torch.allclose(layer(inputs), truth, atol=1e-2 * float(truth.abs().max()))


def test_a_matrix_that_does_not_divide_into_blocks_stays_exact():
    _, model = made(architecture="llama-tied")  # 32 wide, and 64 in the MLP
    inner = model.get_base_model().model.layers[0]
    assert type(inner.self_attn.q_proj) is torch.nn.Linear
    assert type(inner.mlp.down_proj).__name__ == "Linear4bit"


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_learns_on_it_and_is_saved_for_the_exact_weights(workspace, method):
    stage, model = made(method)
    curve = fit(model, stage, workspace / "work", make_examples(4))
    assert curve[-1]["loss"] < 0.8 * curve[0]["loss"]
    stage.save(model, CHECKPOINTS / "one")
    write_json(CHECKPOINTS / "one" / "stage.json", {"parent": "base"})
    base, (one,) = open_stages(["one"])
    path = "model.layers.1.mlp.up_proj"
    adapter = model.cpu().get_base_model().get_submodule(path)
    delta = adapter.lora_B["default"].weight @ adapter.lora_A["default"].weight * adapter.scaling["default"]
    if method == "lora":
        assert torch.allclose(one.delta(path)["weight"], delta, atol=1e-6)
    else:
        summed = base.module(path)["weight"] + delta
        size = adapter.lora_magnitude_vector["default"].weight / summed.norm(dim=1)
        assert torch.allclose(one.module(path)["weight"], summed * size[:, None], atol=1e-5)


def test_an_evaluation_between_two_steps_changes_no_gradient_and_they_are_those_of_the_rounded_weights():
    stage, model = made()
    run = Run(model, stage, Accelerator())

    def gradients():
        run.together([make_examples()])
        found = [p.grad.clone() for p in run.trained.values()]
        run.optimizer.zero_grad()
        return found

    before = gradients()
    model.eval()
    with torch.no_grad():
        model(torch.arange(1, 20, device=device())[None])
    model.train()
    after = gradients()
    assert any(gradient.any() for gradient in before) and all(map(torch.equal, before, after))

    from bitsandbytes.functional import dequantize_4bit

    for path, module in list(model.named_modules()):
        if type(module).__name__ == "Linear4bit":
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=False).requires_grad_(False)
            plain.weight.data = dequantize_4bit(module.weight.data, module.weight.quant_state)
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, plain)
    for found, truth in zip(after, gradients(), strict=True):
        assert torch.allclose(found, truth, rtol=1e-3, atol=1e-6)


def test_what_cannot_be_is_one_sentence(monkeypatch):
    with pytest.raises(MistakeError, match=r"load_in_4bit\) does not go with GPT2"):
        made(architecture="gpt2")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MistakeError, match="needs bitsandbytes; run uv sync --extra four-bit"):
        made()
