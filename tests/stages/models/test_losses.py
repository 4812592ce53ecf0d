"""Losses of the tokens that count: against the logits of all tokens in float64."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from stages.models import losses
from stages.models.architecture import layer_stack
from stages.models.losses import Batch, pad, token_losses
from tests.conftest import ARCHITECTURES, COMMON
from tests.stages.test_train import make_examples

OTHERS = {
    "phi": lambda: PhiForCausalLM(PhiConfig(**COMMON)),  # its output layer has biases
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=4)),
}


def make_model(architecture):
    torch.manual_seed(0)
    made = (ARCHITECTURES | OTHERS)[architecture]()
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


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *OTHERS])
def test_losses_and_gradients_are_those_of_all_logits(architecture, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 50)  # more than one of them
    made, batch = make_model(architecture), pad(make_examples(), 0)
    exact = copy.deepcopy(made).double()
    found, weights = token_losses(made, batch)
    truth = whole(exact, batch)
    assert weights.sum() == batch.weights[:, 1:].sum() > 50
    assert torch.allclose(found.double(), truth, rtol=1e-5, atol=1e-6)
    factors = torch.rand(len(truth), generator=torch.Generator().manual_seed(0))
    (found @ factors).backward()
    (truth @ factors.double()).backward()
    assert (gradients(made) - gradients(exact)).norm() < 1e-5 * gradients(exact).norm()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_last_mlp_computes_only_what_is_asked(architecture):
    made, batch = make_model(architecture), pad(make_examples(), 0)
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
    rows = []
    made.model.layers[-1].mlp.gate.register_forward_pre_hook(lambda _, args: rows.append(args[0][..., 0].numel()))
    token_losses(made, batch)
    assert rows == [batch.ids.numel()]
