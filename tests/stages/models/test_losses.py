"""Losses of the tokens that count: against the logits of all tokens in float64."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from stages.models import losses
from stages.models.architecture import layer_stack
from stages.models.losses import Batch, pad, token_losses
from tests.conftest import ARCHITECTURES, COMMON
from tests.stages.test_train import make_examples


class Doubled(torch.nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


def with_head_of_its_own():
    made = ARCHITECTURES["llama-untied"]()
    made.set_output_embeddings(Doubled(COMMON["hidden_size"], COMMON["vocab_size"], bias=False))
    return made


OTHERS = {
    "a head of its own": with_head_of_its_own,  # which is more than a product
    "phi": lambda: PhiForCausalLM(PhiConfig(**COMMON)),  # its output layer has biases
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=4)),
}
RESCALED = {  # what the output layer gives is not yet the logits
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(head_dim=8, final_logit_softcapping=1.0, **COMMON)),
    "recurrent_gemma": lambda: RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(lru_width=32, attention_window_size=64, logits_soft_cap=1.0, **COMMON)
    ),
    "falcon_h1": lambda: FalconH1ForCausalLM(
        FalconH1Config(
            mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16, lm_head_multiplier=0.1, **COMMON
        )
    ),
}


def make_model(architecture):
    torch.manual_seed(0)
    made = (ARCHITECTURES | OTHERS | RESCALED)[architecture]()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    made.get_output_embeddings().requires_grad_(False)
    return made.eval()


def whole(made, batch: Batch):
    logits = made(input_ids=batch.ids, attention_mask=batch.present).logits[:, :-1]
    asked = batch.weights[:, 1:] != 0
    return cross_entropy(logits[asked], batch.ids[:, 1:][asked], reduction="none")


def gradients(made):
    return torch.cat([p.grad.double().flatten() for p in made.parameters() if p.grad is not None])


TRAINED = [
    *((architecture, "all but the head") for architecture in [*ARCHITECTURES, *OTHERS]),
    ("qwen3", "the head alone"),
]


@pytest.mark.parametrize(("architecture", "trained"), TRAINED)
def test_losses_and_gradients_are_those_of_all_logits(architecture, trained, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 50)  # more than one of them
    made, batch = make_model(architecture), pad(make_examples(), 0)
    if trained == "the head alone":
        made.requires_grad_(False).get_output_embeddings().requires_grad_(True)
    exact = copy.deepcopy(made).double()
    found, weights = token_losses(made, batch)
    truth = whole(exact, batch)
    assert weights.sum() == batch.weights[:, 1:].sum() > 50
    assert torch.allclose(found.double(), truth, rtol=1e-5, atol=1e-6)
    factors = torch.rand(len(truth), generator=torch.Generator().manual_seed(0))
    (found @ factors).backward()
    (truth @ factors.double()).backward()
    assert (gradients(made) - gradients(exact)).norm() < 1e-5 * gradients(exact).norm()


@pytest.mark.parametrize("architecture", RESCALED)
def test_logits_that_the_model_rescales_are_its_own_and_that_is_said_once(architecture):
    made, batch = make_model(architecture), pad(make_examples(), 0)
    exact = copy.deepcopy(made).double()
    with pytest.warns(UserWarning, match=f"the logits of a {architecture} model are not its output layer's alone"):
        found, _ = token_losses(made, batch)
    truth = whole(exact, batch)
    assert torch.allclose(found.double(), truth, rtol=1e-4, atol=1e-5)
    found.sum().backward()
    truth.sum().backward()
    assert (gradients(made) - gradients(exact)).norm() < 1e-4 * gradients(exact).norm()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(token_losses(made, batch)[0], found)


class MixedMLP(torch.nn.Module):
    """An MLP that looks back one position."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden):
        return self.mlp(hidden + hidden.roll(1, dims=1))


@pytest.mark.parametrize("count", [1, 12])
def test_an_mlp_that_mixes_positions_sees_all_of_them(count):
    made, batch = make_model("llama-untied"), pad(make_examples()[:count], 0)
    made.model.layers[-1].mlp = MixedMLP(made.model.layers[-1].mlp)
    assert torch.allclose(token_losses(made, batch)[0], whole(made, batch), rtol=1e-5, atol=1e-6)


def test_a_model_that_is_unlike_all_others_gives_its_logits_whole():
    made, batch = make_model("llama-untied"), pad(make_examples(), 0)
    made.get_output_embeddings = lambda: None
    assert torch.equal(token_losses(made, batch)[0], whole(made, batch))


@pytest.mark.parametrize("autocast", [False, True])
def test_finding_the_way_leaves_no_trace(autocast):
    batch = pad(make_examples(), 0)

    def step(found_before):
        wrapped = get_peft_model(make_model("gpt2"), LoraConfig(lora_dropout=0.5, init_lora_weights=False)).train()
        wrapped.base_model.model.transformer.drop.p = 0.5
        wrapped.base_model.model.transformer.h[0].eval()
        modes = [module.training for module in wrapped.modules()]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if found_before:
                wrapped.way_to_losses = "chunks"
            torch.manual_seed(1)
            losses, _ = token_losses(wrapped, batch)
        losses.sum().backward()
        assert modes == [module.training for module in wrapped.modules()]
        return losses, gradients(wrapped), torch.rand(3)

    for first, again in zip(step(False), step(True), strict=True):
        assert torch.equal(first, again)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_last_mlp_computes_only_what_is_asked(architecture):
    made, batch = make_model(architecture), pad(make_examples(), 0)
    token_losses(made, batch)  # finds the way
    rows = []
    for layer in made.get_submodule(layer_stack(made))[-2:]:
        inner = layer.mlp.act if architecture == "gpt2" else layer.mlp.act_fn
        inner.register_forward_hook(lambda _, args, __: rows.append(args[0][..., 0].numel()))
    found, _ = token_losses(made, batch)
    assert rows == [batch.ids.numel(), len(found)]
    whole(made, batch)
    assert rows[2:] == [batch.ids.numel()] * 2


def test_the_router_of_experts_sees_every_token():
    made, batch = MixtralForCausalLM(MixtralConfig(num_local_experts=2, **COMMON)), pad(make_examples(), 0)
    token_losses(made, batch)  # finds the way
    rows = []
    made.model.layers[-1].mlp.gate.register_forward_pre_hook(lambda _, args: rows.append(args[0][..., 0].numel()))
    token_losses(made, batch)
    assert rows == [batch.ids.numel()]
