"""The kept results of frozen layers: the same bits as without, from another process, within their room."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    BioGptConfig,
    BioGptForCausalLM,
    Gemma3nTextConfig,
    XLMConfig,
)

from stages.files import BASE
from stages.methods import METHODS
from stages.models.architecture import layer_stack
from stages.models.losses import pad, token_losses
from stages.training import prefix as prefix_module
from stages.training.loop import Run
from stages.training.model import put_on
from stages.training.prefix import Prefix
from tests.conftest import ARCHITECTURES, make_base
from tests.stages.test_train import make_examples

CACHE = Path(".dvc/tmp/prefix")


def wrapped(layers="last 2", dtype=torch.float32, method="lora"):
    stage = METHODS[method](parent="base", dataset="d", method=method, lr=1e-2, steps=6, layers=layers)
    torch.manual_seed(0)
    return stage, put_on(stage, AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), dtype)


def gradient(layers="last 2", dtype=torch.float32, limit=None, key="a", method="lora"):
    stage, model = wrapped(layers, dtype, method)
    prefix = None if limit is None else Prefix(model, {"parent": key}, limit)
    precision = "bf16" if dtype == torch.bfloat16 else "no"
    run = Run(model, stage, Accelerator(mixed_precision=precision), prefix)
    loss = run.together([make_examples()])
    return loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_bitwise_those_of_the_whole_model(architecture, dtype, monkeypatch):
    make_base(architecture)
    truth = gradient(dtype=dtype)
    first = gradient(dtype=dtype, limit=1e9)
    monkeypatch.setattr("stages.training.prefix._run", None)  # a third run computes nothing
    again = gradient(dtype=dtype, limit=1e9)
    for loss, found in (first, again):
        assert loss == truth[0] and torch.equal(found, truth[1])


def test_the_layers_work_again_afterwards():
    make_base()
    stage, model = wrapped()
    ids = torch.arange(1, 9)[None]
    before = model(ids).logits
    Run(model, stage, Accelerator(), Prefix(model, {}, 1e9)).together([make_examples()])
    assert torch.equal(model(ids).logits, before)


def test_another_parent_or_depth_has_its_own():
    make_base()
    gradient(limit=1e9)
    gradient(limit=1e9, key="b")
    gradient("last 1", limit=1e9)
    assert len(list(CACHE.iterdir())) == 3


def test_nothing_is_kept_where_the_first_layer_or_the_embedding_is_trained():
    make_base("llama-untied")
    gradient("all", limit=1e9)
    gradient({"embeddings": "all", "mlp": "last 1"}, limit=1e9, method="full")
    assert not CACHE.exists()


def test_it_stays_within_its_room():
    make_base()
    gradient(limit=1e9)
    size = sum(path.stat().st_size for path in CACHE.rglob("*.safetensors"))
    os.utime(next(CACHE.iterdir()), (0, 0))
    gradient(limit=size * 1.5, key="b")  # the older one makes room
    assert len(list(CACHE.iterdir())) == 1
    truth = gradient(key="c")
    assert torch.equal(gradient(limit=1.0, key="c")[1], truth[1])  # without room it works as before
    assert not list(CACHE.rglob("*.tmp"))


def dropout_of_the_embedding(model):
    model.transformer.drop.p = 0.2


def dropout_of_the_residual(model):
    model.transformer.h[0].mlp.dropout.p = 0.2


def dropout_in_a_function(model):
    layer = model.transformer.h[1].mlp
    forward = layer.forward
    layer.forward = lambda hidden: torch.nn.functional.dropout(forward(hidden), 0.2, layer.training)


def noise(model):
    """As the routers of some mixtures of experts have it."""
    model.transformer.h[0].register_forward_pre_hook(
        lambda layer, args: (
            (args[0] * torch.empty_like(args[0]).uniform_(0.9, 1.1), *args[1:]) if layer.training else None
        )
    )


RANDOM = [dropout_of_the_embedding, dropout_of_the_residual, dropout_in_a_function, noise]


@pytest.mark.parametrize("spoil", RANDOM, ids=lambda spoil: spoil.__name__)
def test_what_is_random_is_not_kept_and_is_drawn_as_without_the_cache(spoil):
    make_base("gpt2")
    found = []
    for limit in (0, 1e9):
        stage, model = wrapped()
        spoil(model.get_base_model())
        run = Run(model, stage, Accelerator(), Prefix(model, {}, limit))
        torch.manual_seed(7)
        losses = [run.step([make_examples()], step)["loss"] for step in range(3)]
        run.check(make_examples(4), [{}])
        found.append((losses, [p.detach().clone() for p in run.trained.values()], torch.get_rng_state()))
    assert found[0][0] == found[1][0] and len(set(found[0][0])) == 3
    assert all(map(torch.equal, found[0][1], found[1][1]))
    assert torch.equal(found[0][2], found[1][2])
    assert len(list(CACHE.rglob("*.safetensors"))) == 1  # of the evaluation, which is not random


def test_what_is_kept_of_an_evaluation_is_not_taken_for_training():
    make_base("gpt2")
    stage, model = wrapped()
    dropout_of_the_residual(model.get_base_model())
    run = Run(model, stage, Accelerator(), Prefix(model, {}, 1e9))
    model.eval()
    still = run.together([make_examples()])
    model.train()
    assert run.together([make_examples()]) != still != run.together([make_examples()])


def test_dropout_by_whatever_name_the_config_has_for_it():
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    config = BioGptConfig(**sizes, num_attention_heads=4, max_position_embeddings=64, pad_token_id=0)
    assert config.hidden_dropout_prob > 0  # no other model has this name
    make_base()
    BioGptForCausalLM(config).save_pretrained(BASE)
    found = []
    for limit in (0, 1e9):
        stage, model = wrapped()
        run = Run(model, stage, Accelerator(), Prefix(model, {}, limit))
        torch.manual_seed(7)
        found.append([run.together([make_examples()]) for _ in range(2)])
    assert found[0] == found[1] and found[0][0] != found[0][1]
    assert not list(CACHE.rglob("*.safetensors"))


@pytest.mark.parametrize("moment", ["load_file", "save_file"])
def test_a_folder_that_another_run_deletes_at_this_moment_is_made_again(moment, monkeypatch):
    make_base()
    truth = gradient()
    if moment == "load_file":
        gradient(limit=1e9)
    act, deleted = getattr(prefix_module, moment), []

    def delete_and_act(*args):
        if not deleted:
            deleted.append(shutil.rmtree(next(CACHE.iterdir())))
        return act(*args)

    monkeypatch.setattr(prefix_module, moment, delete_and_act)
    for _ in range(2):
        loss, found = gradient(limit=1e9)
        assert deleted and loss == truth[0] and torch.equal(found, truth[1])
    assert list(CACHE.rglob("*.safetensors")) and not list(CACHE.rglob("*.tmp"))


def test_a_file_that_is_torn_and_a_full_disk_do_no_harm(monkeypatch):
    make_base()
    truth = gradient(limit=1e9)
    for path in CACHE.rglob("*.safetensors"):
        path.write_bytes(b"12345678")
    assert torch.equal(gradient(limit=1e9)[1], truth[1])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prefix_module, "save_file", full)
    assert torch.equal(gradient(limit=1e9, key="b")[1], truth[1])


def test_two_runs_that_make_room_at_once(monkeypatch):
    """The other one deletes a folder that this one has just listed."""
    make_base()
    truth = gradient(limit=1e9)
    size = sum(path.stat().st_size for path in CACHE.rglob("*.safetensors"))
    last_used = prefix_module._last_used

    def delete_and_look(folder):
        shutil.rmtree(folder)
        return last_used(folder)

    monkeypatch.setattr(prefix_module, "_last_used", delete_and_look)
    assert torch.equal(gradient(limit=size * 1.5, key="b")[1], truth[1])


TINY = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
XLM = {"vocab_size": 128, "emb_dim": 32, "n_layers": 3, "n_heads": 4, "dropout": 0.0, "attention_dropout": 0.0}
HANDS_ON = {
    "a tuple": BambaConfig(**TINY, num_key_value_heads=2, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=16),
    "states of other layers": Gemma3nTextConfig(
        **TINY | {"intermediate_size": [64] * 3}, activation_sparsity_pattern=[0.0] * 3, vocab_size_per_layer_input=128,
        num_key_value_heads=2, head_dim=8, num_kv_shared_layers=1, laurel_rank=4, hidden_size_per_layer_input=8,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"], pad_token_id=0,
    ),
    "no stack but a list of attentions": XLMConfig(**XLM, causal=True, n_langs=1, use_lang_emb=False, pad_index=0),
}  # fmt: skip


@pytest.mark.parametrize("kind", HANDS_ON)
def test_layers_of_which_more_than_hidden_states_is_used_are_not_skipped(kind):
    make_base()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(HANDS_ON[kind]).train().requires_grad_(False)
    model.get_submodule(f"{layer_stack(model)}.2").requires_grad_(True)
    batch = pad(make_examples(3), 0)
    truth, _ = token_losses(model, batch)
    prefix = Prefix(model, {"parent": kind}, 1e9)
    with prefix(model, batch):
        found, _ = token_losses(model, batch)
    assert prefix.depth == 2 and torch.equal(found, truth)
