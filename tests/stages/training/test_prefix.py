"""The kept results of frozen layers: the same bits as without, from another process, within their room."""

import os
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from stages.files import BASE
from stages.methods import METHODS
from stages.train import put_on
from stages.training.loop import Run
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


def test_layers_that_drop_out_at_random_are_not_kept():
    make_base("gpt2")
    stage, model = wrapped()
    model.config.resid_pdrop = 0.1
    Run(model, stage, Accelerator(), Prefix(model, {}, 1e9)).together([make_examples()])
    assert not list(CACHE.rglob("*.safetensors"))
